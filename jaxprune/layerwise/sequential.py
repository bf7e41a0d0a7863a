"""Pruning in execution order: every layer sees what the layers pruned before it send."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune import _jaxpr, _rows, _tree, _walk
from jaxprune._typing import Layerwise, Masks, Params, Prunable
from jaxprune.calibration import (
    Gram,
    add_at,
    as_args,
    check_used,
    find_uses,
    governed_leaves,
    gram_of,
    input_grams,
)
from jaxprune.layerwise import _driver
from jaxprune.layerwise._program import Op, Program, Slot, build
from jaxprune.layerwise.sparsegpt import sparsegpt


class LayerLog(NamedTuple):
    """What happened to one layer.

    ``error`` is the squared error of the layer's outputs relative to their squared norm.
    """

    path: str
    sparsity: float
    error: float


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
      progress: called with a layer's ``path``, ``sparsity`` and relative ``error`` once it is done.
      activation_dtype: hold floating calibration activations in this type between layers.
      on_host: hold them in host memory.

    Returns:
      ``(params, masks, log)``; ``log`` lists (path, sparsity, error) in execution order.

    Raises:
      ValueError: if no matmul consumes a governed leaf, batches differ in shape, there is none, or
        a Gram is not positive definite.

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
    _driver.check_target(sparsity, n_m)
    held = [as_args(batch) for batch in batches]
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
    store = _Store(activation_dtype, on_host)
    walk = _Walk(program, jax.tree.leaves(params), held, store)
    prune = _Pruner(traced.paths, walk.leaves, uses, targets, n_m, method, progress)
    _run(walk, prune, early)
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
    return jnp.where(whole > 0, change / jnp.where(whole > 0, whole, 1), 0)


_relative_error = jax.jit(relative_error)


def _energy(rows: jax.Array, gram: Gram) -> jax.Array:
    matrix = _driver.matrices(gram)
    moved = jnp.einsum("gon,gnm->gom", rows, matrix, precision=lax.Precision.HIGHEST)
    return jnp.sum(moved * rows)


class _Store(NamedTuple):
    """How activations are held between operations."""

    dtype: Any
    on_host: bool

    def put(self, x: jax.Array) -> Any:
        if self.dtype is not None and jnp.issubdtype(x.dtype, jnp.floating):
            x = x.astype(self.dtype)
        return np.asarray(x) if self.on_host else x

    def get(self, x: Any, aval: Any) -> jax.Array:
        return jnp.asarray(x).astype(aval.dtype) if x.dtype != aval.dtype else jnp.asarray(x)


class _Walk:
    """The values of a program as far as it has run: shared ones once, others once per batch."""

    def __init__(self, program: Program, leaves: list[Any], batches: Sequence[Any], store: _Store):
        self.program, self.leaves, self.store = program, list(leaves), store
        self.count = len(batches)
        flat = [jax.tree.leaves(batch) for batch in batches]
        self.held: dict[Slot, list[Any]] = {
            slot: [args[i] for args in flat] for i, slot in enumerate(program.args)
        }
        self.constants = dict(program.constants)
        self.compiled: dict[Any, Callable[..., Any]] = {}

    def shared(self, slot: Slot) -> Any:
        """The value of a shared slot; those derived from a governed leaf are never remembered."""
        if slot.leaf is not None:
            return self.leaves[slot.leaf]
        if slot in self.constants:
            return self.constants[slot]
        op = slot.producer
        assert op is not None
        call = self.jitted(("op", op.key), lambda: jax.jit(op.run))
        outs = call(*(self.shared(s) for s in op.ins))
        if not any(s.trail is not None for s in (*op.ins, *op.outs)):
            self.constants.update(zip(op.outs, outs, strict=True))
        return outs[op.outs.index(slot)]

    def values(self, slot: Slot, batch: int) -> Any:
        if slot.shared:
            return self.shared(slot)
        return self.store.get(self.held[slot][batch], slot.aval)

    def jitted(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.compiled:
            self.compiled[key] = make()
        return self.compiled[key]

    def run(self, ops: list[Op], later: set[Slot]) -> None:
        """Run operations as one compiled function per batch; keep what ``later`` needs."""
        produced = {slot for op in ops for slot in op.outs}
        ins = list(dict.fromkeys(s for op in ops for s in op.ins if s not in produced))
        outs = [slot for op in ops for slot in op.outs if slot in later]
        numbers = {slot: i for i, slot in enumerate(ins)}
        for op in ops:
            for slot in op.outs:
                numbers[slot] = len(numbers)
        key = (
            tuple((op.key, tuple(numbers[s] for s in op.ins)) for op in ops),
            tuple(numbers[s] for s in outs),
            tuple(str(s.aval) for s in ins),
        )

        def segment(*values):
            env = dict(zip(ins, values, strict=True))
            for op in ops:
                env.update(zip(op.outs, op.run(*(env[s] for s in op.ins)), strict=True))
            return [self.store.put(env[s]) if not self.store.on_host else env[s] for s in outs]

        call = self.jitted(key, lambda: jax.jit(segment))
        fixed = {slot: self.shared(slot) for slot in ins if slot.shared}
        results: list[list[Any]] = [[] for _ in outs]
        for batch in range(self.count):
            values = [fixed[s] if s.shared else self.values(s, batch) for s in ins]
            for result, value in zip(results, call(*values), strict=True):
                result.append(self.store.put(value))
        self.held.update(zip(outs, results, strict=True))
        for slot in [slot for slot in self.held if slot not in later]:
            del self.held[slot]


class _Pruner:
    """Prunes parts of leaves as they are met, and remembers masks and the log."""

    def __init__(self, paths, leaves, uses, targets, n_m, method, progress):
        self.paths, self.leaves, self.uses, self.targets = paths, leaves, uses, targets
        self.n_m, self.method, self.progress = n_m, method, progress
        self.masks: dict[int, jax.Array] = {}
        self.log: list[LayerLog] = []

    def __call__(self, leaf: int, index: tuple[Any, ...], matrix: jax.Array) -> None:
        """Prune the part of a leaf at ``index`` (of its stack) with the part's Gram."""
        use, whole = self.uses[leaf], self.leaves[leaf]
        taken = {a: i for a, i in zip(use.stack, index, strict=True) if i is not None}
        starts = tuple(taken.get(a, 0) for a in range(whole.ndim))
        sizes = tuple(1 if a in taken else n for a, n in enumerate(whole.shape))
        old = _block(whole, starts, sizes) if taken else whole
        gram = Gram(matrix, use.axes, use.stack)
        position = "".join(f"[{taken[a]}]" for a in sorted(taken))
        path = self.paths[leaf] + position
        options = {} if self.n_m is None else {"n_m": self.n_m}
        new, mask = self.method({path: old}, {path: gram}, self.targets[leaf], **options)
        error = _relative_error(old, new[path], gram)
        if taken:
            before = self.masks.get(leaf, jnp.ones(whole.shape, bool))
            self.masks[leaf] = _replace(before, mask[path], starts)
            self.leaves[leaf] = _replace(whole, new[path], starts)
        else:
            self.masks[leaf], self.leaves[leaf] = mask[path], new[path]
        removed = 1 - float(jnp.mean(mask[path], dtype=jnp.float32))
        self.log.append(LayerLog(path, removed, float(error)))
        if self.progress is not None:
            self.progress(self.log[-1])


@partial(jax.jit, static_argnames="sizes")
def _block(x, starts, sizes):
    return lax.dynamic_slice(x, starts, sizes)


@jax.jit
def _replace(x, part, starts):
    return lax.dynamic_update_slice(x, part, starts)


def _run(walk: _Walk, prune: _Pruner, early: dict[int, Gram]) -> None:
    """Run the program up to the last governed matmul, pruning on the way."""
    ops = _needed(walk.program)
    last = {slot: at for at, op in enumerate(ops) for slot in op.ins}
    pending: list[Op] = []
    done: set[tuple[int, tuple[Any, ...]]] = set()
    grams: dict[Any, jax.Array] = {}

    def flush(at):
        later = {slot for slot, when in last.items() if when >= at}
        if pending:
            walk.run(pending, later)
            pending.clear()
        for key in [key for key in grams if not key[0] <= later]:
            del grams[key]

    for at, op in enumerate(ops):
        if op.leaves:
            flush(at)
            for leaf, index, matrix in _grams_at(walk, op, prune.uses, grams):
                if (leaf, index) not in done:
                    done.add((leaf, index))
                    if leaf in early:
                        matrix = _part(early[leaf].matrix, index)
                    prune(leaf, index, matrix)
        if not all(slot.shared for slot in op.outs):
            pending.append(op)


def _needed(program: Program) -> list[Op]:
    """The operations that governed matmuls depend on, and those matmuls, in order."""
    wanted: set[Slot] = set()
    kept = []
    for op in reversed(program.ops):
        if op.leaves or any(slot in wanted for slot in op.outs):
            kept.append(op)
            wanted.update(op.ins)
    return kept[::-1]


def _grams_at(walk: _Walk, op: Op, uses, cache):
    """The Grams of all leaves that an operation consumes: (leaf, index, matrix) each."""
    trails = [getattr(x, "trail", None) for x in op.operands]
    inputs = frozenset(x for x in op.operands if isinstance(x, Slot) and x.trail is None)
    kinds = tuple(t and (t.shape, t.dims, tuple(a for a, _ in t.index)) for t in trails)
    key = (inputs, op.key, kinds, tuple(str(x.aval) for x in op.operands))
    positions = {t.leaf: dict(t.index) for t in trails if t is not None}
    if key not in cache or op.eqn.primitive.name != "dot_general":
        cache[key] = _sum_grams(walk, op, trails, key[1:], uses)
    found = cache[key]
    for leaf, total in zip(op.leaves, found, strict=True):
        taken = positions[leaf]
        yield leaf, tuple(taken.get(a) for a in uses[leaf].stack), total


def _sum_grams(walk: _Walk, op: Op, trails, key, uses) -> list[jax.Array]:
    """The Grams at an operation over all batches, one for each of ``op.leaves``.

    Positions that are fixed outside are set to zero, in matrices with a single entry there.
    """
    inner = [t and t._replace(index=tuple((a, 0) for a, _ in t.index)) for t in trails]
    fixed = {t.leaf: {a for a, _ in t.index} for t in trails if t is not None}

    def start(leaf):
        use = uses[leaf]
        groups = [1 if a in fixed[leaf] else n for a, n in zip(use.stack, use.groups, strict=True)]
        shape = walk.program.params[leaf].aval
        n = _rows.fan_in(shape.shape, use)
        return jnp.zeros((*groups, n, n), jnp.promote_types(shape.dtype, jnp.float32))

    def add(totals, *values):
        left = iter(values)
        operands = [next(left) if isinstance(x, Slot) else x.val for x in op.operands]

        def watch(totals, meeting):
            at = op.leaves.index(meeting.leaf)
            shaped = meeting._replace(
                use=meeting.use._replace(groups=totals[at].shape[: len(meeting.use.stack)])
            )
            part = add_at(totals[at], shaped, gram_of(meeting.x))
            return [part if i == at else t for i, t in enumerate(totals)]

        return _walk.step(op.eqn, operands, inner, watch, totals).carry

    call = walk.jitted(("gram", key), lambda: jax.jit(add, donate_argnums=0))
    slots = [x for x in op.operands if isinstance(x, Slot)]
    batches = range(1 if all(slot.shared for slot in slots) else walk.count)
    totals = [start(leaf) for leaf in op.leaves]
    for batch in batches:
        totals = call(totals, *(walk.values(slot, batch) for slot in slots))
    return totals


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
                    if (leaf, trail.index) in seen:
                        again.add(leaf)
                    seen.add((leaf, trail.index))
    return again


def _grams_in(grams: Any) -> list[Gram]:
    return jax.tree.leaves(grams, is_leaf=lambda x: isinstance(x, Gram))


def _check_alike(batches: Sequence[Any]) -> None:
    first = jax.tree.map(jax.typeof, batches[0])
    for i, batch in enumerate(itertools.islice(batches, 1, None), start=1):
        if jax.tree.map(jax.typeof, batch) != first:
            raise ValueError(
                f"batch {i} has other shapes than the first; cut or pad batches to one shape"
            )


def _check_met(paths, leaves: set[int], program: Program) -> None:
    met = {leaf for op in program.ops for leaf in op.leaves}
    for leaf in sorted(leaves - met):
        raise ValueError(
            f"{paths[leaf]}: which part of it a matmul reads depends on data; leave it out with "
            "prunable, or prune with jp.input_grams and the method itself"
        )
