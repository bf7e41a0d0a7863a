"""What each path will get, before anything runs."""

from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune import _checks, _paths, _table, _tree
from jaxprune._tree import kernels
from jaxprune._typing import Allocation, Masking, Params, Prunable
from jaxprune.allocation import allocate_uniform
from jaxprune.masks import mask_topk
from jaxprune.saliency.accumulate import check_criterion, memory_of, score
from jaxprune.saliency.weights import magnitude


class LeafPlan(NamedTuple):
    """One governed leaf: its rules in words, its budget, and how much of it the structure keeps.

    ``note`` says where N:M is not what comes of it: an allocation gave more or less.
    """

    path: str
    shape: tuple[int, ...]
    allocation: str
    structure: str
    budget: int
    kept: int
    size: int
    note: str


class Plan(NamedTuple):
    """What ``explain`` found; prints as a table, shows as one in a notebook.

    Attributes:
      leaves: one row for each governed leaf.
      requested: the sparsity asked for.
      others: paths that are not governed.
    """

    leaves: tuple[LeafPlan, ...]
    requested: float
    others: tuple[str, ...]

    @property
    def sparsity(self) -> float:
        """Fraction of the governed weights that will be removed."""
        return _sparsity(self.leaves)

    @property
    def by_structure(self) -> dict[str, float]:
        """Fraction removed of the leaves that share a structure."""
        names = dict.fromkeys(row.structure for row in self.leaves)
        return {name: _sparsity(self._of(name)) for name in names}

    def __str__(self) -> str:
        table, feet = self._rows()
        return _table.text(table, left=(0, 1, 2, 3, 7), feet=feet)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return _table.markup(self._rows()[0])

    def _of(self, structure: str) -> list[LeafPlan]:
        return [row for row in self.leaves if row.structure == structure]

    def _rows(self) -> tuple[list[tuple[str, ...]], int]:
        def cells(rows, *first):
            kept, size = sum(row.kept for row in rows), sum(row.size for row in rows)
            return (*first, f"{kept:,}", f"{size:,}", f"{_sparsity(rows):.4%}")

        head = ("leaf", "shape", "allocation", "structure", "kept", "size", "sparsity", "")
        body = [
            (*cells([row], row.path, str(row.shape), row.allocation, row.structure), row.note)
            for row in self.leaves
        ]
        body += [(path, "", "not governed", "", "", "", "", "") for path in self.others]
        parts = [(*cells(self._of(name), "", "", "", name), "") for name in self.by_structure]
        total = (*cells(self.leaves, "total", "", f"asked for {self.requested:.4%}", ""), "")
        feet = [*parts, total] if len(parts) > 1 else [total]
        return [head, *body, *feet], len(feet)


def explain(
    params: Params,
    sparsity: Any,
    *,
    saliency: Any = magnitude,
    allocate: Allocation = allocate_uniform,
    mask: Masking = mask_topk,
    prunable: Prunable = kernels,
    grads: Params | None = None,
    key: jax.Array | None = None,
) -> Plan:
    """Path, rule and sparsity of every leaf, and what each structure takes, before training.

    Runs the pipeline once on these parameters, without changing them: every rule, shape and number
    is checked.

    Args:
      params: any tree of arrays.
      sparsity: the fraction of all governed weights to remove, a number; of a schedule, its end.
      saliency: as a transform takes it.
      allocate: as a transform takes it, such as ``jp.allocate_by_path`` gives.
      mask: as a transform takes it, such as ``jp.mask_by_path`` gives.
      prunable: ``(path, leaf) -> bool``, which leaves are governed.
      grads: gradients like ``params``, for criteria that need them.
      key: for random criteria.

    Returns:
      A ``Plan``: print it, or show it in a notebook. Its last line is what the rules come to, the
      nearest to what was asked for that floors and structures can reach.

    Raises:
      ValueError: for whatever the pipeline would refuse.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"head": jnp.ones((2, 4)), "mlp": jnp.ones((4, 4))}
      >>> print(jp.explain(params, 0.75, allocate=jp.allocate_by_path({"head": None})))
      leaf   shape   allocation          structure  kept  size  sparsity
      ------------------------------------------------------------------
      head   (2, 4)  untouched           mask_topk     8     8   0.0000%
      mlp    (4, 4)  allocate_uniform    mask_topk     4    16  75.0000%
      ------------------------------------------------------------------
      total          asked for 75.0000%               12    24  50.0000%
    """
    _checks.check_sparsity(sparsity)
    _checks.check_steps(allocate=allocate, mask=mask)
    check_criterion(saliency)
    _checks.check_key(key, optional=True)
    governed = _tree.select(params, prunable)
    ask, _ = score(saliency, governed, grads, memory_of(saliency, governed), key)
    scores = ask()
    keep = allocate(scores, sparsity)
    masks = mask(scores, keep)
    _tree.check_masks(masks, governed)
    counts, found = (dict(_tree.leaves_with_paths(tree)) for tree in (keep, masks))
    allocations, structures = (_paths.rules_of(f, scores) for f in (allocate, mask))
    rows, others = list[LeafPlan](), list[str]()
    for path, leaf in _tree.leaves_with_paths(governed):
        if leaf is None:
            others.append(path)
            continue
        kept = int(np.count_nonzero(found[path]))
        words = _paths.name(allocations[path]), _paths.name(structures[path])
        note = _against_n_m(structures[path], kept, leaf.size)
        budget = int(counts[path])
        rows.append(LeafPlan(path, tuple(leaf.shape), *words, budget, kept, leaf.size, note))
    return Plan(tuple(rows), float(sparsity), tuple(others))


def _against_n_m(structure: Any, kept: int, size: int) -> str:
    """How a leaf under a gradual N:M differs from it."""
    if not hasattr(structure, "n_m"):
        return ""
    n, m = structure.n_m
    exact = size // m * n
    if kept == exact:
        return ""
    return f"{'not' if kept > exact else 'within'} {n}:{m}, which keeps {exact:,}"


def _sparsity(rows: Any) -> float:
    return 1.0 - sum(row.kept for row in rows) / sum(row.size for row in rows)
