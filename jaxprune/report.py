"""What was asked for and what was reached."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune import _table, _tree
from jaxprune._typing import Masks, Params, PyTree
from jaxprune.masks import unpack_masks
from jaxprune.transforms._driver import PruningState
from jaxprune.transforms.masked import MaskedParamsState

_STATES = (PruningState, MaskedParamsState)


def get_masks(state: PyTree, params: Params) -> Masks:
    """The masks inside any optimizer state that holds ours.

    Where several transforms hold masks, they are merged: a partition's each serve their leaves, and
    a leaf with two masks keeps what both keep.

    Args:
      state: an optax state of any nesting, or an NNX optimizer's ``opt_state``.
      params: the parameters that the state belongs to.

    Returns:
      Bool masks with the structure of ``params``, ``None`` where not governed.

    Raises:
      ValueError: if there is no pruning state, or it belongs to other parameters.
      TypeError: for the state in the place of the parameters.

    Example:
      >>> import jax.numpy as jnp, optax, jaxprune as jp
      >>> params = {"kernel": jnp.ones((2, 2))}
      >>> tx = jp.prune_gradually(optax.sgd(0.1), 0.5, when=jp.every(10))
      >>> jp.get_masks(tx.init(params), params)["kernel"].shape
      (2, 2)
    """
    found = list(_pruning_states(state))
    if not found:
        _check_order("get_masks(state, params)", params)
        raise ValueError(
            "no pruning state here: pass the state of an optimizer that a jaxprune transform wraps"
        )
    paths, structure = _tree.leaves_with_paths(params), _tree.structure(params)
    merged: list[jax.Array | None] = [None] * len(paths)
    for part in found:
        leaves = [_value(leaf) for leaf in jax.tree.leaves(part.masks, is_leaf=_no_mask)]
        if len(leaves) != len(paths):
            raise ValueError(
                f"the state masks {len(leaves)} leaves, params has {len(paths)}; pass the "
                "parameters that the optimizer was initialized with (of an NNX model, "
                "nnx.state(model, nnx.Param))"
            )
        for i, leaf in enumerate(leaves):
            if leaf is None:
                continue
            mask = leaf
            if leaf.dtype != jnp.bool_:
                mask = unpack_masks({paths[i][0]: leaf}, {paths[i][0]: paths[i][1]})[paths[i][0]]
            merged[i] = mask if merged[i] is None else merged[i] & mask
    masks = jax.tree.unflatten(structure, merged)
    _tree.check_masks(masks, params)
    return masks


class LeafSummary(NamedTuple):
    """One governed leaf: how many of its ``size`` weights are ``kept``, and what is odd there."""

    path: str
    shape: tuple[int, ...]
    kept: int
    size: int
    note: str

    @property
    def sparsity(self) -> float:
        """Fraction removed."""
        return 1.0 - self.kept / self.size


class Summary(NamedTuple):
    """What ``summarize`` found; prints as a table, shows as one in a notebook.

    Attributes:
      leaves: one row for each governed leaf.
      requested: the sparsity last asked for, where the optimizer state knows it.
      target: the sparsity asked for in the end, likewise.
      others: weights of the model that are not governed.
      revived: weights that are masked and yet not zero.
      nans: governed weights that are NaN.
      step: updates done so far, where the optimizer state knows it.
    """

    leaves: tuple[LeafSummary, ...]
    requested: float | None
    target: float | None
    others: int
    revived: int
    nans: int
    step: int | None

    @property
    def kept(self) -> int:
        """Governed weights that are kept."""
        return sum(row.kept for row in self.leaves)

    @property
    def size(self) -> int:
        """Governed weights."""
        return sum(row.size for row in self.leaves)

    @property
    def sparsity(self) -> float:
        """Fraction of the governed weights that is removed."""
        return 1.0 - self.kept / self.size

    def as_dict(self) -> dict[str, float]:
        """Flat numbers for a logger: sparsity per path and in total, counts, what was asked for."""
        numbers: dict[str, float] = {f"sparsity/{row.path}": row.sparsity for row in self.leaves}
        numbers |= {"sparsity": self.sparsity, "kept": self.kept, "size": self.size}
        numbers |= {"revived": self.revived, "nans": self.nans}
        known = {"requested": self.requested, "target": self.target}
        return numbers | {name: value for name, value in known.items() if value is not None}

    def __str__(self) -> str:
        table = self._table()
        text = _table.text(table, left=(0, 1, len(table[0]) - 1))
        return "\n".join((text, *self._warnings()))

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return _table.markup(self._table(), self._warnings())

    def _warnings(self) -> list[str]:
        """NaN, another sparsity than the requested one, and masked weights that are not zero."""
        found = []
        if self.nans:
            what = (
                "they rank last" if self.step is None else "masks stay as they are while scores are"
            )
            found.append(f"{self.nans:,} WEIGHTS ARE NaN; {what}")
        if self.requested is not None and abs(self.kept - self.size * (1 - self.requested)) > 1:
            found.append(
                f"{self.sparsity:.4%} is not what was asked for: floors, rules, whole units, "
                "masks from the start or scores that were NaN"
            )
        if self.revived and self.step == 0:
            found.append(
                f"{self.revived:,} masked weights are not zero yet: the first update zeroes them"
            )
        elif self.revived:
            found.append(
                f"{self.revived:,} MASKED WEIGHTS ARE NOT ZERO: apply_masks, or put jaxprune's "
                "transform outermost"
            )
        return found

    def _table(self) -> list[tuple[str, ...]]:
        parts = []
        if self.requested is not None:
            parts.append(f"asked for {self.requested:.4%}")
            if self.target is not None and self.target != self.requested:
                parts = [f"last {parts[0]}, the schedule ends at {self.target:.4%}"]
        if self.others:
            parts.append(f"{self.others:,} weights not governed")
        note = "; ".join(parts)
        rows = [
            (
                row.path,
                str(row.shape),
                f"{row.kept:,}",
                f"{row.size:,}",
                f"{row.sparsity:.4%}",
                row.note,
            )
            for row in self.leaves
        ]
        total = ("total", "", f"{self.kept:,}", f"{self.size:,}", f"{self.sparsity:.4%}", note)
        return [("leaf", "shape", "kept", "size", "sparsity", ""), *rows, total]


def summarize(params: Params, masks: Any = None) -> Summary:
    """Per governed leaf and in total: shape, weights kept, size, sparsity asked for and reached.

    Args:
      params: any tree of arrays.
      masks: bool masks like ``params``, or an optimizer state that holds them; by default the
        nonzero weights of the leaves that ``jp.kernels`` selects.

    Returns:
      A ``Summary``: print it, show it in a notebook, or log its ``as_dict()``.

    Raises:
      ValueError: if masks or state do not fit the parameters, or nothing is governed.
      TypeError: for the state in the place of the parameters.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> print(jp.summarize({"kernel": jnp.eye(2)}))
      leaf    shape   kept  size  sparsity
      ------------------------------------
      kernel  (2, 2)     2     4  50.0000%
      ------------------------------------
      total              2     4  50.0000%
    """
    _check_order("summarize(params, state)", params)
    requested = target = step = None
    if masks is None:
        masks = jax.tree.map(lambda p: p != 0, _tree.select(params))
    else:
        states = list(_pruning_states(masks))
        if states:
            known = [s for s in states if isinstance(s, PruningState)]
            if len(known) == 1 and not math.isnan(_value(known[0].sparsity)):
                requested = float(_value(known[0].sparsity))
                (target,) = (float(_value(v)) for v in known[0].target.values())
            if len(known) == len(states):
                step = max(int(_value(s.step)) for s in known)
            masks = get_masks(masks, params)
        elif _tree.structure(masks) != _tree.structure(params) and not any(_tree.are_bools(masks)):
            raise ValueError(
                "masks is neither a tree like params nor an optimizer state that holds masks; "
                "give one of these, or nothing to count weights that are not zero"
            )
    _tree.check_masks(masks, params)
    rows: list[LeafSummary] = []
    others = revived = nans = 0
    seen = dict[int, str]()
    pairs = zip(_tree.leaves_with_paths(params), _tree.leaves_with_paths(masks), strict=True)
    for (path, leaf), (_, mask) in pairs:
        if mask is None:
            others += math.prod(np.shape(leaf)) if leaf is not None else 0
            continue
        kept = int(np.count_nonzero(mask))
        revived += int(jnp.sum((leaf != 0) & ~mask, dtype=jnp.int32))
        nans += int(jnp.sum(leaf != leaf, dtype=jnp.int32))
        note = {0: "NOTHING IS KEPT", 1: "at its floor" if mask.size > 1 else ""}.get(kept, "")
        if id(leaf) in seen:
            note = f"same array as {seen[id(leaf)]}; share one leaf, or its masks may differ"
        seen[id(leaf)] = path
        rows.append(LeafSummary(path, tuple(leaf.shape), kept, mask.size, note))
    if not rows:
        raise ValueError("nothing to summarize: no leaf is governed")
    return Summary(tuple(rows), requested, target, others, revived, nans, step)


def _check_order(call: str, params: PyTree) -> None:
    if any(_pruning_states(params)):
        raise TypeError(f"params holds a pruning state; the call is {call}")


def _pruning_states(tree: PyTree) -> Iterator[PruningState | MaskedParamsState]:
    for node in jax.tree.leaves(tree, is_leaf=lambda n: isinstance(n, _STATES)):
        if isinstance(node, _STATES):
            yield node
            if isinstance(node, PruningState):
                yield from _pruning_states(node.inner_state)


def _no_mask(value: Any) -> bool:
    return value is None or isinstance(value, optax.MaskedNode)


def _value(leaf: Any) -> Any:
    """The array of a leaf, which NNX wraps in a variable."""
    if _no_mask(leaf):
        return None
    return leaf if hasattr(leaf, "dtype") and hasattr(leaf, "shape") else leaf[...]
