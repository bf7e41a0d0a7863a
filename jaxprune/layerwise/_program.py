"""A model as a straight line of operations; matmuls that consume governed leaves are marked."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.extend import core

from jaxprune import _jaxpr, _trail, _walk
from jaxprune._trail import Trail


class Slot:
    """A value of the program: an input, or what an operation gives.

    ``shared`` values do not depend on the batch, ``changing`` ones do on governed leaves. ``leaf``
    numbers an input that is a parameter.
    """

    __slots__ = ("aval", "changing", "leaf", "producer", "shared", "trail")

    def __init__(self, aval, *, shared, trail=None, leaf=None):
        self.aval, self.shared, self.trail, self.leaf = aval, shared, trail, leaf
        self.changing = trail is not None
        self.producer: Op | None = None


class Op(NamedTuple):
    """``run(*ins) -> outs``; ``key`` is equal for operations that compute the same function.

    ``eqn`` is the equation, where it is one, and ``leaves`` the governed leaves it consumes.
    """

    run: Callable[..., list[Any]]
    key: Any
    ins: tuple[Slot, ...]
    outs: tuple[Slot, ...]
    eqn: Any = None
    operands: tuple[Any, ...] = ()
    leaves: tuple[int, ...] = ()


class Program(NamedTuple):
    """Operations in execution order, the slots of the parameters and arguments, and constants."""

    ops: list[Op]
    params: list[Slot]
    args: list[Slot]
    constants: dict[Slot, Any]


def build(traced: _jaxpr.Traced, leaves: set[int]) -> Program:
    """The program of a traced model; scans over stacked governed leaves are unrolled."""
    count = len(traced.paths)
    program = Program([], [], [], {})
    for i, aval in enumerate(traced.jaxpr.in_avals):
        trail = _trail.start(i, aval.shape) if i in leaves else None
        leaf = i if i < count else None
        slot = Slot(aval, shared=i < count, trail=trail, leaf=leaf)
        (program.params if i < count else program.args).append(slot)
    _emit_jaxpr(program, traced.jaxpr, [*program.params, *program.args])
    return program


def resolve(program: Program, slot: Slot) -> Any:
    """The value of a slot that depends on constants only, such as a loop counter, or ``None``."""
    if slot in program.constants:
        return program.constants[slot]
    if slot.producer is None:
        return None
    ins = [resolve(program, s) for s in slot.producer.ins]
    if any(value is None for value in ins):
        return None
    outs = slot.producer.run(*ins)
    program.constants.update(zip(slot.producer.outs, outs, strict=True))
    return program.constants[slot]


def _emit_jaxpr(program: Program, jaxpr: core.ClosedJaxpr, ins: Sequence[Any]) -> list[Any]:
    """Append the operations of ``jaxpr``; its outputs as slots or literals."""
    env: dict[Any, Any] = {}
    for var, const in zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True):
        env[var] = _constant(program, var.aval, const)
    env.update(zip(jaxpr.jaxpr.invars, ins, strict=True))

    def read(atom):
        return atom if isinstance(atom, core.Literal) else env[atom]

    for eqn in jaxpr.jaxpr.eqns:
        outs = _emit(program, eqn, [read(atom) for atom in eqn.invars])
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.jaxpr.outvars]


def _emit(program: Program, eqn: core.JaxprEqn, operands: list[Any]) -> list[Any]:
    trails = [_trail_of(x) for x in operands]
    leaves: tuple[int, ...] = ()
    after: list[Trail | None] = [None] * len(eqn.outvars)
    if any(trail is not None for trail in trails):
        inner = _jaxpr.called(eqn)
        if inner is not None:
            return _emit_jaxpr(program, inner, operands)
        name = eqn.primitive.name
        if name in ("scan", "while", "cond"):
            found = _meetings_inside(eqn, trails)
            if name == "scan" and any(_indexed_inside(m, trails) for m in found):
                return _unroll(program, eqn, operands)
            leaves = tuple(dict.fromkeys(m.leaf for m in found))
        elif name in _walk.MATMULS:
            leaves = tuple(dict.fromkeys(m.leaf for m in _meetings_inside(eqn, trails)))
        else:
            after = _trail.follow(eqn, trails, [_position(program, x) for x in operands])
    ins = tuple(x for x in operands if isinstance(x, Slot))
    shared = all(slot.shared for slot in ins) and not eqn.effects
    outs = tuple(
        Slot(var.aval, shared=shared, trail=trail)
        for var, trail in zip(eqn.outvars, after, strict=True)
    )

    def run(*values):
        left = iter(values)
        return _walk.bind(eqn, [next(left) if isinstance(x, Slot) else x.val for x in operands])

    key = (
        eqn.primitive,
        _key(eqn.params),
        tuple("slot" if isinstance(x, Slot) else _key(x) for x in operands),
    )
    _append(program, Op(run, key, ins, outs, eqn, tuple(operands), leaves))
    return list(outs)


def _unroll(program: Program, eqn: core.JaxprEqn, operands: list[Any]) -> list[Any]:
    """A scan as its turns, one after the other."""
    first, last = _walk.scan_parts(eqn)
    body, length = eqn.params["jaxpr"], eqn.params["length"]
    operands = [_as_slot(program, x) for x in operands]
    state, per_turn = operands[first:last], []
    order = range(length - 1, -1, -1) if eqn.params["reverse"] else range(length)
    for i in order:
        slices = [_take(program, slot, i) for slot in operands[last:]]
        outs = _emit_jaxpr(program, body, [*operands[:first], *state, *slices])
        outs = [_as_slot(program, x) for x in outs]
        state = outs[: last - first]
        per_turn.append(outs[last - first :])
    if eqn.params["reverse"]:
        per_turn.reverse()
    stacked = [_stack(program, list(turns)) for turns in zip(*per_turn, strict=True)]
    return [*state, *stacked]


def _take(program: Program, slot: Slot, i: int) -> Slot:
    """The slot of entry ``i`` of the first axis; ``i`` is an input, so that all share a key."""
    position = _constant(program, None, np.int32(i))
    out = Slot(
        slot.aval.update(shape=slot.aval.shape[1:]),
        shared=slot.shared,
        trail=slot.trail and slot.trail.take(0, i),
    )

    def run(x, i):
        return [lax.dynamic_index_in_dim(x, i, keepdims=False)]

    _append(program, Op(run, "take", (slot, position), (out,)))
    return out


def _stack(program: Program, slots: list[Slot]) -> Slot:
    aval = slots[0].aval.update(shape=(len(slots), *slots[0].aval.shape))
    out = Slot(aval, shared=all(slot.shared for slot in slots))

    def run(*xs):
        return [jax.numpy.stack(xs)]

    _append(program, Op(run, "stack", tuple(slots), (out,)))
    return out


def _append(program: Program, op: Op) -> None:
    for slot in op.outs:
        slot.producer = op
        slot.changing = slot.changing or any(x.changing for x in op.ins)
    program.ops.append(op)


def _constant(program: Program, aval: Any, value: Any) -> Slot:
    slot = Slot(aval, shared=True)
    program.constants[slot] = value
    return slot


def _as_slot(program: Program, x: Any) -> Slot:
    return x if isinstance(x, Slot) else _constant(program, x.aval, x.val)


def _trail_of(x: Any) -> Trail | None:
    return x.trail if isinstance(x, Slot) else None


def _position(program: Program, x: Any) -> Any:
    """An operand as an index, if it is one: a whole number known before the model runs."""
    if not isinstance(x, Slot):
        return int(x.val) if np.ndim(x.val) == 0 else None
    whole = x.aval is not None and x.aval.shape == () and np.issubdtype(x.aval.dtype, np.integer)
    value = resolve(program, x) if x.shared and whole else None
    return None if value is None else int(value)


def _meetings_inside(eqn: core.JaxprEqn, trails) -> list[_walk.Meeting]:
    found: list[_walk.Meeting] = []

    def watch(carry, meeting):
        found.append(meeting)
        return carry

    def run(values):
        return _walk.step(eqn, values, trails, watch, ()).values

    avals: list[Any] = [x.aval for x in eqn.invars]
    jax.eval_shape(run, [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals])
    return found


def _indexed_inside(meeting: _walk.Meeting, trails) -> bool:
    """Whether the loop, and not something around it, picks the part of the leaf that is met."""
    outside = max(len(t.taken) for t in trails if t is not None and t.leaf == meeting.leaf)
    return sum(at is not None for at in meeting.taken) > outside


def _key(value: Any) -> Any:
    """A hashable stand-in that is equal for parameters that mean the same."""
    if isinstance(value, core.Literal):
        return ("literal", _key(np.asarray(value.val)), str(value.aval))
    if isinstance(value, core.ClosedJaxpr | core.Jaxpr):  # one class since JAX 0.12
        consts = getattr(value, "consts", ())
        return (_key_of_jaxpr(value), tuple(id(const) for const in consts))
    if isinstance(value, dict):
        return tuple((name, _key(value[name])) for name in sorted(value))
    if isinstance(value, list | tuple):
        return (type(value), tuple(_key(item) for item in value))
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, value.tobytes())
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value


def _key_of_jaxpr(jaxpr: Any) -> Any:
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    numbers: dict[Any, int] = {}

    def name(atom):
        if isinstance(atom, core.Literal):
            return _key(atom)
        return (numbers.setdefault(atom, len(numbers)), str(atom.aval))

    head = tuple(name(var) for var in (*jaxpr.constvars, *jaxpr.invars))
    body = tuple(
        (
            eqn.primitive,
            _key(eqn.params),
            tuple(name(atom) for atom in eqn.invars),
            tuple(name(var) for var in eqn.outvars),
        )
        for eqn in jaxpr.eqns
    )
    return head, body, tuple(name(atom) for atom in jaxpr.outvars)
