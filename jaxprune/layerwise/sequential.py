"""Pruning in execution order: every layer sees what the layers pruned before it send."""

import collections
import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune import _checks, _jaxpr, _tree
from jaxprune._typing import Layerwise, Masks, Params, Prunable
from jaxprune.calibration import (
    Gram,
    as_args,
    check_used,
    find_uses,
    governed_leaves,
    input_grams,
)
from jaxprune.layerwise import _driver
from jaxprune.layerwise._program import Op, Program, Slot, build
from jaxprune.layerwise._targets import Target, Targets, sums_after
from jaxprune.layerwise._values import Store, Walk, grams_at
from jaxprune.layerwise.sparsegpt import sparsegpt


class LayerLog(NamedTuple):
    """What happened to one layer.

    ``error`` is the squared error of the layer's outputs relative to their squared norm.
    """

    path: str
    sparsity: float
    error: float


_IMITATION_DAMPING = 0.03

Progress = Callable[[LayerLog], Any]


def prune_layerwise(
    apply: Callable[..., Any],
    params: Params,
    batches: Iterable[Any],
    sparsity: Any = None,
    *,
    n_m: tuple[int, int] | None = None,
    method: Layerwise = sparsegpt,
    prunable: Prunable = _tree.kernels,
    progress: Progress | None = None,
    dense_targets: bool = False,
    donate: bool = False,
    activation_dtype: Any = None,
    on_host: bool = False,
) -> tuple[Params, Masks, list[LayerLog]]:
    r"""Prune layer by layer in execution order, each on the outputs of those already pruned.

    The model is evaluated once, equation by equation, for all batches side by side. Where a
    governed weight meets its inputs, ``method`` prunes it with the Gram matrix of those, and the
    walk goes on with the new weight. Layers stacked by scan are pruned one by one. A weight that is
    used several times, or inside a loop that does not index it, is pruned at its first use, for all
    of them: with the Gram of the dense model, or of the whole loop.

    Args:
      apply: ``apply(params, *batch)``, the model.
      params: a tree of arrays.
      batches: an iterable of batches of one shape, all held; a tuple is splatted into ``apply``,
        anything else is one argument.
      sparsity: fraction of each governed leaf to remove, or a tree of fractions like ``params``.
      n_m: ``(n, m)`` instead: keep n of each m consecutive inputs of every output.
      method: any layerwise method: ``jp.sparsegpt``, ``jp.alps``, ``jp.by_saliency(jp.wanda)``.
      prunable: which leaves are governed.
      progress: called with each layer's entry of the log, once it is done.
      dense_targets: imitate the outputs that the layer has in the dense model, not those that the
        dense weights would give for the inputs that arrive; where outputs are added to a value
        that is there already (a residual stream), the sum. So later layers make up for earlier
        ones. A second, dense walk goes along.
      donate: delete the arrays of ``params`` that are pruned, each as soon as it is, so that one
        model is in memory and not two; an array that several leaves share stays, and so does one
        of NumPy. An error half-way leaves a model with holes.
      activation_dtype: hold floating calibration activations in this type between layers.
      on_host: hold them in host memory.

    Returns:
      ``(params, masks, log)``; ``log`` lists (path, sparsity, error) in execution order.

    Raises:
      ValueError: if no matmul consumes a governed leaf, batches differ in shape, there is none, a
        weight is not finite, a Gram is not positive definite, or ``dense_targets`` is asked for and
        its weights donated.
      TypeError: if ``batches`` is one array, ``method`` no layerwise method, ``progress`` cannot be
        called with a layer, or values are traced: this is for outside of ``jax.jit``.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> apply = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
      >>> params = {"a": jnp.eye(4) + 0.1, "b": jnp.ones((4, 2))}
      >>> _, masks, log = jp.prune_layerwise(apply, params, [jnp.eye(4)], 0.5)
      >>> [(layer.path, layer.sparsity) for layer in log]
      [('a', 0.5), ('b', 0.5)]

    Reference:
      Frantar, Alistarh. SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot,
      2023 (calibration on the outputs of pruned layers).
    """
    _checks.check_apply(apply)
    _driver.check_target(sparsity, n_m)
    _checks.check_step("method", method, None, *([] if n_m is None else ["n_m"]))
    _checks.check_batches(batches)
    if progress is not None:
        _checks.check_step("progress", progress)
    if donate and dense_targets:
        raise ValueError("dense_targets needs the dense weights to the end; leave donate out")
    if activation_dtype is not None and not jnp.issubdtype(activation_dtype, jnp.floating):
        raise TypeError(f"activation_dtype is {activation_dtype}; give a floating one")
    held = [as_args(batch) for batch in batches]
    if not all(map(_checks.is_concrete, jax.tree.leaves((params, held, sparsity)))):
        raise TypeError("prune_layerwise decides layer by layer; call it outside of jax.jit")
    if not held:
        raise ValueError("no batches to calibrate on; an exhausted generator gives none either")
    _check_alike(held)
    leaves = governed_leaves(params, prunable)
    traced = _jaxpr.trace(apply, params, *held[0])
    uses, lost = find_uses(traced, leaves)
    check_used(traced, leaves, uses, lost)
    program = build(traced, leaves)
    _check_met(traced.paths, leaves, program)
    repeated = _used_again(program)
    governed = _tree.select(params, prunable)
    early = {}
    if repeated:
        again = {traced.paths[i] for i in repeated}
        grams = input_grams(apply, params, held, prunable=lambda path, _: path in again)
        early = dict(zip(sorted(repeated), _grams_in(grams), strict=True))
    targets = [None] * len(traced.paths)
    if sparsity is not None:
        wanted = jax.tree.leaves(_driver.per_leaf(governed, sparsity))
        for i, target in zip(sorted(leaves), wanted, strict=True):
            targets[i] = target
    store = Store(activation_dtype, on_host)
    walk = Walk(program, jax.tree.leaves(params), held, store)
    prune = _Pruner(traced.paths, walk.leaves, uses, targets, n_m, method, progress, donate)
    twin = Walk(program, walk.leaves, held, store, walk.compiled) if dense_targets else None
    _run(walk, twin, prune, early)
    structure = jax.tree.structure(params)
    masks = [prune.masks.get(i) for i in range(len(traced.paths))]
    return (
        jax.tree.unflatten(structure, walk.leaves),
        jax.tree.unflatten(structure, masks),
        prune.log,
    )


def relative_error(old: jax.Array, new: jax.Array, gram: Gram) -> jax.Array:
    r""":math:`\|X (\hat W - W)\|^2 / \|X W\|^2`, zero where the outputs are."""
    change = _energy(_driver.as_groups(new, gram) - _driver.as_groups(old, gram), gram)
    whole = _energy(_driver.as_groups(old, gram), gram)
    return jnp.where(whole == 0, 0, change / jnp.where(whole == 0, 1, whole))


_relative_error = jax.jit(relative_error)


def _energy(rows: jax.Array, gram: Gram) -> jax.Array:
    matrix = _driver.matrices(gram)
    moved = jnp.einsum("gon,gnm->gom", rows, matrix, precision=lax.Precision.HIGHEST)
    return jnp.sum(moved * rows)


class _Pruner:
    """Prunes parts of leaves as they are met, and remembers masks and the log."""

    def __init__(self, paths, leaves, uses, targets, n_m, method, progress, donate):
        self.paths, self.leaves, self.uses, self.targets = paths, leaves, uses, targets
        self.n_m, self.method, self.progress = n_m, method, progress
        times = collections.Counter(map(id, leaves))
        # Leaves whose arrays are the caller's, and stay.
        self.lent = {i for i, leaf in enumerate(leaves) if not donate or times[id(leaf)] > 1}
        self.masks: dict[int, jax.Array] = {}
        self.log: list[LayerLog] = []

    def __call__(
        self, leaf: int, index: tuple[Any, ...], matrix: jax.Array, target: Target | None
    ) -> None:
        """Prune the part of a leaf at ``index`` (of its stack) with the part's Gram."""
        use, whole = self.uses[leaf], self.leaves[leaf]
        taken = {a: i for a, i in zip(use.stack, index, strict=True) if i is not None}
        starts = tuple(taken.get(a, 0) for a in range(whole.ndim))
        sizes = tuple(1 if a in taken else n for a, n in enumerate(whole.shape))
        old = _block(whole, starts, sizes) if taken else whole
        gram = Gram(matrix, use.axes, use.stack)
        if target is not None:
            old = _imitating(old, gram, target)
        position = "".join(f"[{taken[a]}]" for a in sorted(taken))
        path = self.paths[leaf] + position
        options = {} if self.n_m is None else {"n_m": self.n_m}
        new, mask = self.method({path: old}, {path: gram}, self.targets[leaf], **options)
        error = _relative_error(old, new[path], gram)
        if taken:
            mine = whole if leaf not in self.lent else jnp.copy(whole)
            before = self.masks.get(leaf)
            before = jnp.ones(whole.shape, bool) if before is None else before
            self.masks[leaf] = _replace(before, mask[path], starts)
            self.leaves[leaf] = _replace(mine, new[path], starts)
        else:
            self.masks[leaf], self.leaves[leaf] = mask[path], new[path]
            if leaf not in self.lent and isinstance(whole, jax.Array):
                whole.delete()
        self.lent.discard(leaf)
        removed = 1 - float(jnp.mean(mask[path], dtype=jnp.float32))
        self.log.append(LayerLog(path, removed, float(error)))
        if self.progress is not None:
            self.progress(self.log[-1])


@partial(jax.jit, static_argnames="sizes")
def _block(x, starts, sizes):
    return lax.dynamic_slice(x, starts, sizes)


@partial(jax.jit, donate_argnums=0)
def _replace(x, part, starts):
    return lax.dynamic_update_slice(x, part, starts)


@jax.jit
def _imitating(leaf: jax.Array, gram: Gram, target: Target) -> jax.Array:
    """The dense weights that best turn what arrives into the outputs of the dense model."""

    def one(rows, matrix, cross, missing):
        damped, _ = _driver.regularize(matrix, _IMITATION_DAMPING)
        missing += jnp.matmul(rows, (cross - matrix).T, precision=lax.Precision.HIGHEST)
        factor = jax.scipy.linalg.cho_factor(damped)
        return rows + jax.scipy.linalg.cho_solve(factor, missing.T).T

    matrix = _driver.matrices(gram)
    rows = _driver.as_groups(leaf, gram)
    missing = jnp.zeros_like(rows)
    if target.missing is not None:
        missing = _driver.as_groups(target.missing.reshape(leaf.shape), gram)
    rows = _driver.over_groups(one, rows, matrix, target.cross.reshape(matrix.shape), missing)
    return _driver.back(rows, leaf, gram).astype(leaf.dtype)


def _run(walk: Walk, twin: Walk | None, prune: _Pruner, early: dict[int, Gram]) -> None:
    """Run the program up to the last governed matmul, pruning on the way."""
    sums = {} if twin is None else sums_after(walk.program)
    targets = None if twin is None else Targets(walk, twin, sums)

    def reads(op):
        added = [sums[slot].other for slot in op.outs if slot in sums]
        return (*op.ins, *added)

    ops = _needed(walk.program, reads)
    last = {slot: at for at, op in enumerate(ops) for slot in reads(op)}
    pending: list[Op] = []
    done: set[tuple[int, tuple[Any, ...]]] = set()
    grams: dict[Any, jax.Array] = {}

    def flush(at):
        """Run what the operation at ``at`` waits for; the rest stays pending."""
        wanted = set(reads(ops[at]))
        now: list[Op] = []
        rest: list[Op] = []
        for op in reversed(pending):
            due = any(slot in wanted for slot in op.outs)
            wanted.update(op.ins if due else ())
            (now if due else rest).append(op)
        pending[:] = rest[::-1]
        later = {slot for slot, when in last.items() if when >= at}
        later.update(slot for op in pending for slot in op.ins)
        for side in (walk, twin):
            if side is not None and now:
                side.run(now[::-1], later)
        for key in [key for key in grams if not key[0] <= later]:
            del grams[key]

    for at, op in enumerate(ops):
        if op.leaves:
            flush(at)
            for leaf, index, matrix in grams_at(walk, op, prune.uses, grams):
                if (leaf, index) not in done:
                    done.add((leaf, index))
                    if leaf in early:
                        matrix = _part(early[leaf].matrix, index)
                    target = None
                    if targets is not None and leaf not in early:
                        target = targets.at(op, grams)
                    prune(leaf, index, matrix, target)
        if not all(slot.shared for slot in op.outs):
            pending.append(op)


def _needed(program: Program, reads: Callable[[Op], tuple[Slot, ...]]) -> list[Op]:
    """The operations that governed matmuls depend on, and those matmuls, in order."""
    wanted: set[Slot] = set()
    kept = []
    for op in reversed(program.ops):
        if op.leaves or any(slot in wanted for slot in op.outs):
            kept.append(op)
            wanted.update(reads(op))
    return kept[::-1]


def _part(matrix: jax.Array, index: tuple[Any, ...]) -> jax.Array:
    for axis, at in enumerate(index):
        if at is not None:
            matrix = lax.dynamic_slice_in_dim(matrix, at, 1, axis)
    return matrix


def _used_again(program: Program) -> set[int]:
    """Leaves of which a part meets more than one operation."""
    seen: set[Any] = set()
    again = set()
    for op in program.ops:
        for leaf in op.leaves:
            for x in op.operands:
                trail = getattr(x, "trail", None)
                if trail is not None and trail.leaf == leaf:
                    if (leaf, trail.taken) in seen:
                        again.add(leaf)
                    seen.add((leaf, trail.taken))
    return again


def _grams_in(grams: Any) -> list[Gram]:
    return jax.tree.leaves(grams, is_leaf=lambda x: isinstance(x, Gram))


def _check_alike(batches: Sequence[Any]) -> None:
    first = jax.tree.map(jax.typeof, batches[0])
    for i, batch in enumerate(itertools.islice(batches, 1, None), start=1):
        types = jax.tree.map(jax.typeof, batch)
        if types != first:
            raise ValueError(
                f"batch {i} is {types}, the first {first}; cut or pad batches to one shape"
            )


def _check_met(paths, leaves: set[int], program: Program) -> None:
    met = {leaf for op in program.ops for leaf in op.leaves}
    for leaf in sorted(leaves - met):
        raise ValueError(
            f"{paths[leaf]}: which part of it a matmul reads depends on data; leave it out with "
            "prunable, or prune with jp.input_grams and the method itself"
        )
