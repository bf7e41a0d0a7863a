"""The values of a program as far as it has run, and the Grams of what arrives at its matmuls."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _rows, _walk
from jaxprune.calibration import add_at, gram_of
from jaxprune.layerwise._program import Op, Program, Slot


class Store(NamedTuple):
    """How activations are held between operations."""

    dtype: Any
    on_host: bool

    def put(self, x: jax.Array) -> Any:
        if self.dtype is not None and jnp.issubdtype(x.dtype, jnp.floating):
            x = x.astype(self.dtype)
        return np.asarray(x) if self.on_host else x

    def get(self, x: Any, aval: Any) -> jax.Array:
        return jnp.asarray(x).astype(aval.dtype) if x.dtype != aval.dtype else jnp.asarray(x)


class Walk:
    """The values of a program as far as it has run: shared ones once, others once per batch."""

    def __init__(
        self,
        program: Program,
        leaves: Sequence[Any],
        batches: Sequence[Any],
        store: Store,
        compiled: dict[Any, Callable[..., Any]] | None = None,
    ):
        self.program, self.leaves, self.store = program, list(leaves), store
        self.count = len(batches)
        flat = [jax.tree.leaves(batch) for batch in batches]
        self.held: dict[Slot, list[Any]] = {
            slot: [args[i] for args in flat] for i, slot in enumerate(program.args)
        }
        self.constants = dict(program.constants)
        self.compiled = {} if compiled is None else compiled

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
        if not any(s.changing for s in op.outs):
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
        gone = [slot for slot in self.held if slot not in later]
        for batch in range(self.count):
            values = [fixed[s] if s.shared else self.values(s, batch) for s in ins]
            for slot in gone:
                self.held[slot][batch] = None
            for result, value in zip(results, call(*values), strict=True):
                result.append(self.store.put(value))
        for slot in gone:
            del self.held[slot]
        self.held.update(zip(outs, results, strict=True))


def grams_at(
    walk: Walk, op: Op, uses: dict[int, Any], cache: dict[Any, Any]
) -> Iterator[tuple[int, tuple[Any, ...], jax.Array]]:
    """The Grams of all leaves that an operation consumes: (leaf, index, matrix) each."""
    trails = [getattr(x, "trail", None) for x in op.operands]
    inputs = frozenset(x for x in op.operands if isinstance(x, Slot) and x.trail is None)
    kinds = tuple(t and (t.shape, t.dims, tuple(a for a, _ in t.taken)) for t in trails)
    key = (inputs, op.key, kinds, tuple(str(x.aval) for x in op.operands))
    positions = {t.leaf: dict(t.taken) for t in trails if t is not None}
    if key not in cache or op.eqn.primitive.name != "dot_general":
        cache[key] = _sum_grams(walk, op, trails, key[1:], uses)
    found = cache[key]
    for leaf, total in zip(op.leaves, found, strict=True):
        taken = positions[leaf]
        yield leaf, tuple(taken.get(a) for a in uses[leaf].stack), total


def _sum_grams(walk: Walk, op: Op, trails, key, uses) -> list[jax.Array]:
    """The Grams at an operation over all batches, one for each of ``op.leaves``.

    Positions that are fixed outside are set to zero, in matrices with a single entry there.
    """
    inner = [t and t._replace(taken=tuple((a, 0) for a, _ in t.taken)) for t in trails]
    fixed = {t.leaf: {a for a, _ in t.taken} for t in trails if t is not None}

    def start(leaf):
        use = uses[leaf]
        groups = [1 if a in fixed[leaf] else n for a, n in zip(use.stack, use.groups, strict=True)]
        shape = walk.program.params[leaf].aval
        n = _rows.fan_in(shape.shape, use)
        return jnp.zeros((*groups, n, n), _walk.wide_dtype(shape.dtype))

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
