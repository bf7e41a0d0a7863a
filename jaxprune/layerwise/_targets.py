"""What a layer imitates: the outputs of the dense model, whose walk goes alongside."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune import _placement, _walk
from jaxprune.calibration import product
from jaxprune.layerwise._program import Op, Program, Slot
from jaxprune.layerwise._values import Walk

_MOVES = ("convert_element_type", "copy", "copy_p", "reshape", "reshard", "squeeze", "transpose")


class Target(NamedTuple):
    """Sums over the calibration set of what arrives, X, against the dense model's values.

    ``cross`` is ``X^T X_dense``. Where the outputs are added to a value S that is there already,
    such as a residual stream, ``missing`` is ``X^T (S_dense - S)`` in the shape of the weight (of
    its part, for stacked layers): the layer can make up for it. Else it is ``None``.
    """

    cross: jax.Array
    missing: jax.Array | None


class Sum(NamedTuple):
    """What the outputs of a matmul are added to, and what moves them before that."""

    other: Slot
    moves: list[Op]


class Targets:
    """The targets of a walk's matmuls."""

    def __init__(self, walk: Walk, dense: Walk, sums: dict[Slot, Sum]):
        self.walk, self.dense, self.sums = walk, dense, sums

    def at(self, op: Op, cache: dict[Any, Any]) -> Target | None:
        """The target at an operation; ``None`` unless it is a matmul of one governed leaf."""
        tagged = [i for i, x in enumerate(op.operands) if getattr(x, "trail", None) is not None]
        if len(tagged) != 1 or op.eqn.primitive.name not in _walk.MATMULS:
            return None
        return Target(self._cross(op, cache), self._missing(op, tagged[0]))

    def _cross(self, op: Op, cache: dict[Any, Any]) -> jax.Array:
        trails = [getattr(x, "trail", None) for x in op.operands]
        inputs = frozenset(x for x in op.operands if isinstance(x, Slot) and x.trail is None)
        kinds = tuple(t and (t.shape, t.dims, tuple(a for a, _ in t.taken)) for t in trails)
        key = (inputs, "cross", op.key, kinds, tuple(str(x.aval) for x in op.operands))
        if key in cache:
            return cache[key]
        inner = [t and t._replace(taken=tuple((a, 0) for a, _ in t.taken)) for t in trails]

        def meet(values):
            left = iter(values)
            operands = [next(left) if isinstance(x, Slot) else x.val for x in op.operands]
            (meeting,) = _walk.meetings(op.eqn, operands, inner)
            return meeting.x

        def cross(values, dense_values):
            pair = meet(values), meet(dense_values)
            return _placement.call_in_auto(product, *pair, small=True)

        def add(total, values, dense_values):
            return total + cross(values, dense_values)

        call = self.walk.jitted(key[1:], lambda: jax.jit(add, donate_argnums=0))
        slots = [x for x in op.operands if isinstance(x, Slot)]
        batches = range(1 if all(slot.shared for slot in slots) else self.walk.count)
        total: Any = None
        for batch in batches:
            pair = [[side.values(s, batch) for s in slots] for side in (self.walk, self.dense)]
            if total is None:
                shape = jax.eval_shape(cross, *pair)
                total = jnp.zeros(shape.shape, shape.dtype)
            total = call(total, *pair)
        cache[key] = total
        return total

    def _missing(self, op: Op, side: int) -> jax.Array | None:
        weight, given = op.operands[side], op.operands[1 - side]
        added, way = self.sums.get(op.outs[0]), _moved_from_leaf(weight)
        if added is None or way is None or not isinstance(given, Slot) or given.shared:
            return None
        (other, after), (base, before) = added, way
        dtype = _walk.wide_dtype(weight.aval.dtype)
        shape = jax.ShapeDtypeStruct(weight.aval.shape, dtype)

        exact = {"precision": (lax.Precision.HIGHEST,) * 2, "preferred_element_type": None}
        exact |= {"out_sharding": None} if "out_sharding" in op.eqn.params else {}

        def turned(x, ours, theirs):
            def outputs(w):
                pair = (w, x.astype(dtype)) if side == 0 else (x.astype(dtype), w)
                out = op.eqn.primitive.bind(*pair, **op.eqn.params | exact)
                for move in after:
                    (out,) = move.run(out)
                return out

            gap = theirs.astype(dtype) - ours.astype(dtype)
            (part,) = jax.linear_transpose(outputs, shape)(
                gap.astype(jax.eval_shape(outputs, shape).dtype)
            )
            return part

        def add(total, *values):
            return total + _placement.call_in_auto(turned, *values, small=True)

        avals = tuple(str(x.aval) for x in (*op.operands, other))
        key = ("missing", side, op.key, tuple(move.key for move in after), avals)
        call = self.walk.jitted(key, lambda: jax.jit(add, donate_argnums=0))
        total = jnp.zeros(shape.shape, dtype)
        for batch in range(self.walk.count):
            gap = (side.values(other, batch) for side in (self.walk, self.dense))
            total = call(total, self.walk.values(given, batch), *gap)

        def forth(w):
            for move in before:
                (w,) = move.run(w)
            return w

        start = jax.ShapeDtypeStruct(base.aval.shape, base.aval.dtype)
        (total,) = jax.linear_transpose(forth, start)(total.astype(weight.aval.dtype))
        return total


def sums_after(program: Program) -> dict[Slot, Sum]:
    """The sums that matmuls of governed leaves go into, and nothing else, by their outputs.

    A sum counts if the other value is there before the matmul runs. Sums with what is the same for
    all batches, such as a bias, are passed over.
    """
    order = {slot: at for at, op in enumerate(program.ops) for slot in op.outs}
    consumers: dict[Slot, list[Op]] = {}
    for op in program.ops:
        for slot in op.ins:
            consumers.setdefault(slot, []).append(op)

    def sum_after(at, slot):
        moves = []
        while len(consumers.get(slot, ())) == 1:
            (after,) = consumers[slot]
            name = "" if after.eqn is None else after.eqn.primitive.name
            others = [x for x in after.ins if x is not slot and not x.shared]
            if name in _MOVES:
                moves.append(after)
            elif name not in ("add", "add_any"):
                return None
            elif others:
                known = order.get(others[0], -1) < at
                return Sum(others[0], moves) if known else None
            (slot,) = after.outs
        return None

    found = {
        op.outs[0]: sum_after(at, op.outs[0])
        for at, op in enumerate(program.ops)
        if op.leaves and op.eqn.primitive.name in _walk.MATMULS
    }
    return {slot: total for slot, total in found.items() if total is not None}


def _moved_from_leaf(weight: Slot) -> tuple[Slot, list[Op]] | None:
    """The leaf, or the part of it that is taken, and the moves from there to ``weight``."""
    slot, moves = weight, []
    while slot.producer is not None:
        (source,) = [s for s in slot.producer.ins if s.trail is not None]
        if source.trail.taken != weight.trail.taken:
            break
        if slot.producer.eqn is None or slot.producer.eqn.primitive.name not in _MOVES:
            return None
        moves.append(slot.producer)
        slot = source
    axes = [piece.axis for dim in slot.trail.dims for piece in dim]
    whole = all(p.size == slot.trail.shape[p.axis] for d in slot.trail.dims for p in d)
    return (slot, moves[::-1]) if whole and axes == sorted(axes) else None
