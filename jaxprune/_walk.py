"""Evaluating a jaxpr while watching what arrives at the matmuls that consume given leaves."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jaxprune import _jaxpr, _trail
from jaxprune._trail import Trail

MATMULS = ("dot_general", "conv_general_dilated")


class Use(NamedTuple):
    """How a matmul reads a leaf.

    It contracts ``axes``; along each axis of ``stack`` the leaf falls into as many equal parts as
    ``groups`` says, and every part has inputs of its own.
    """

    axes: tuple[int, ...]
    stack: tuple[int, ...]
    groups: tuple[int, ...]


class Meeting(NamedTuple):
    """A leaf and its inputs: ``x`` is (*groups met here, rows, fan-in), float32 or wider.

    ``taken`` has one entry per axis of ``use.stack``: a position that a loop fixed, or ``None``
    where ``x`` has that axis.
    """

    leaf: int
    use: Use
    taken: tuple[Any, ...]
    x: jax.Array


Watch = Callable[[Any, Meeting], Any]
"""``watch(carry, meeting) -> carry``: what to do with a meeting; the carry goes through loops."""


class Outcome(NamedTuple):
    """Values and trails of the outputs, and the carry."""

    values: list[Any]
    trails: list[Trail | None]
    carry: Any


def evaluate(
    jaxpr: core.ClosedJaxpr,
    values: Sequence[Any],
    trails: Sequence[Trail | None],
    watch: Watch,
    carry: Any,
    lost: dict[int, str] | None = None,
) -> Outcome:
    """The outputs of ``jaxpr``, with ``watch`` called at every matmul that consumes a trail.

    ``lost`` is filled with the primitives at which leaves were lost sight of.
    """
    env: dict[Any, Any] = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
    env.update(zip(jaxpr.jaxpr.invars, values, strict=True))
    known: dict[Any, Trail] = {
        var: trail
        for var, trail in zip(jaxpr.jaxpr.invars, trails, strict=True)
        if trail is not None
    }

    def value(atom):
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    def trail_of(atom):
        return None if isinstance(atom, core.Literal) else known.get(atom)

    for eqn in jaxpr.jaxpr.eqns:
        ins = [value(atom) for atom in eqn.invars]
        tags = [trail_of(atom) for atom in eqn.invars]
        outs, out_tags, carry = step(eqn, ins, tags, watch, carry, lost)
        env.update(zip(eqn.outvars, outs, strict=True))
        known.update(
            (var, tag) for var, tag in zip(eqn.outvars, out_tags, strict=True) if tag is not None
        )
    outputs = jaxpr.jaxpr.outvars
    return Outcome([value(v) for v in outputs], [trail_of(v) for v in outputs], carry)


def step(
    eqn: core.JaxprEqn,
    values: Sequence[Any],
    trails: Sequence[Trail | None],
    watch: Watch,
    carry: Any,
    lost: dict[int, str] | None = None,
) -> Outcome:
    """One equation of ``evaluate``."""
    none: list[Trail | None] = [None] * len(eqn.outvars)
    name = eqn.primitive.name
    if all(trail is None for trail in trails):
        return Outcome(bind(eqn, values), none, carry)
    inner = _jaxpr.called(eqn)
    if inner is not None:
        return evaluate(inner, values, trails, watch, carry, lost)
    if name in _LOOPS:
        return _LOOPS[name](eqn, values, trails, watch, carry, lost)
    if name in MATMULS:
        for meeting in meetings(eqn, values, trails, lost):
            carry = watch(carry, meeting)
        return Outcome(bind(eqn, values), none, carry)
    after = _trail.follow(eqn, trails, values)
    if lost is not None:
        kept = {trail.leaf for trail in after if trail is not None}
        for trail in trails:
            if trail is not None and trail.leaf not in kept:
                lost.setdefault(trail.leaf, name)
    return Outcome(bind(eqn, values), after, carry)


def bind(eqn: core.JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """The outputs of one equation."""
    bound = eqn.primitive.get_bind_params(eqn.params)
    subfuns, params = bound if isinstance(bound, tuple) else ((), bound)
    out = eqn.primitive.bind(*subfuns, *values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def meetings(
    eqn: core.JaxprEqn,
    values: Sequence[Any],
    trails: Sequence[Trail | None],
    lost: dict[int, str] | None = None,
) -> list[Meeting]:
    """Who meets whom at a matmul: each operand with a trail is a weight, the other its input."""
    found = []
    for side, trail in enumerate(trails):
        if trail is None:
            continue
        if eqn.primitive.name == "dot_general":
            meeting = _at_dot(eqn, trail, side, values[1 - side])
        else:
            meeting = _at_conv(eqn, trail, values[0]) if side == 1 else None
        if meeting is not None:
            found.append(meeting)
        elif lost is not None:
            lost.setdefault(trail.leaf, eqn.primitive.name + " over part of an axis")
    return found


def _at_dot(eqn, trail, side, x):
    contracting, batch = eqn.params["dimension_numbers"]
    mine, theirs = contracting[side], contracting[1 - side]
    ours, batch_x = batch[side], batch[1 - side]
    rows = [d for d in range(x.ndim) if d not in theirs and d not in batch_x]
    x = x.transpose(*batch_x, *rows, *theirs)
    return _meet(trail, x, [trail.dims[d] for d in ours], len(rows), [trail.dims[d] for d in mine])


def _at_conv(eqn, trail, x):
    params = eqn.params
    numbers = params["dimension_numbers"]
    groups = params["feature_group_count"]
    if params["batch_group_count"] != 1:
        return None
    out, into, *space = numbers.rhs_spec
    split = _trail.reshape(
        [trail.dims[out]], (groups, eqn.invars[1].aval.shape[out] // max(groups, 1))
    )
    if split is None:
        return None
    kernel = [eqn.invars[1].aval.shape[d] for d in space]
    patches = lax.conv_general_dilated_patches(
        _wide(x),
        kernel,
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        dimension_numbers=numbers,
        precision=lax.Precision.HIGHEST,
    )
    n, channel, *where = numbers.out_spec
    patches = patches.transpose(n, *where, channel)
    patches = patches.reshape(*patches.shape[:-1], groups, -1, *kernel)
    spread = len(where) + 1
    patches = jnp.moveaxis(patches, spread, 0)
    return _meet(trail, patches, [split[0]], spread, [trail.dims[d] for d in (into, *space)])


def _meet(trail: Trail, x, batch, rows: int, contracted) -> Meeting | None:
    """The meeting of a trail with ``x``, whose dimensions are batch, rows, contracted."""
    pieces = [piece for dim in (*batch, *contracted) for piece in dim]
    shape = [piece.size for dim in batch for piece in dim]
    shape += x.shape[len(batch) : len(batch) + rows]
    shape += [piece.size for dim in contracted for piece in dim]
    x = _wide(x).reshape(shape)
    first = sum(len(dim) for dim in batch)
    last = first + rows
    free = list(range(first, last))
    stacked: list[tuple[int, int, int, int]] = []
    fan_in: list[tuple[int, int, int, int]] = []
    summed: list[int] = []
    for i, piece in enumerate(pieces):
        at = i if i < first else i + rows
        if piece.axis is None:
            (free if i < first else summed).append(at)
        else:
            (stacked if i < first else fan_in).append((piece.axis, -piece.stride, piece.size, at))
    stacked.sort()
    fan_in.sort()
    axes = tuple(dict.fromkeys(axis for axis, *_ in fan_in))
    covered = all(
        math.prod(size for a, _, size, _ in fan_in if a == axis) == trail.shape[axis]
        for axis in axes
    )
    groups: dict[int, int] = {}
    for axis, step_, n, _ in stacked:
        major = axis not in groups and -step_ * n == trail.shape[axis]
        if axis in axes or not (major or n == 1):
            return None
        groups[axis] = n * groups.get(axis, 1)
    taken = dict(trail.taken)
    if not axes or not covered or any(a in axes or a in groups for a in taken):
        return None
    x = x.transpose(*(at for *_, at in stacked), *free, *summed, *(at for *_, at in fan_in))
    lead = len(stacked) + len(free)
    x = x.sum(tuple(range(lead, lead + len(summed))))
    x = x.reshape(*groups.values(), -1, math.prod(n for _, _, n, _ in fan_in))
    stack = tuple(sorted({*groups, *taken}))
    use = Use(axes, stack, tuple(groups.get(a, trail.shape[a]) for a in stack))
    return Meeting(trail.leaf, use, tuple(taken.get(a) for a in stack), x)


def scan_parts(eqn: core.JaxprEqn) -> tuple[int, int]:
    """Where the carry and where the slices begin among the operands of a scan.

    Read off the ranks, as the names of the primitive's parameters differ between versions of JAX.
    """
    body = eqn.params["jaxpr"].jaxpr
    slices = sum(
        _rank(atom) > _rank(inner) for atom, inner in zip(eqn.invars, body.invars, strict=True)
    )
    carried = sum(
        _rank(var) == _rank(inner) for var, inner in zip(eqn.outvars, body.outvars, strict=True)
    )
    last = len(eqn.invars) - slices
    return last - carried, last


def _rank(atom: Any) -> int:
    return atom.aval.ndim


def wide_dtype(dtype: Any) -> Any:
    """float32, or ``dtype`` if that is floating and as wide."""
    wide = jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize >= 4
    return jnp.dtype(dtype) if wide else jnp.dtype(jnp.float32)


def _wide(x):
    return x.astype(wide_dtype(x.dtype))


def _scan(eqn, values, trails, watch, carry, lost) -> Outcome:
    body, params = eqn.params["jaxpr"], eqn.params
    first, last = scan_parts(eqn)
    length, reverse = params["length"], params["reverse"]
    consts = values[:first]
    kept = _forwarded(body.jaxpr.invars[first:last], body.jaxpr.outvars, trails[first:last])

    def run(state, slices):
        i, inner, carry = state
        position = length - 1 - i if reverse else i
        here = [trail and trail.take(0, position) for trail in trails[last:]]
        out = evaluate(
            body, [*consts, *inner, *slices], [*trails[:first], *kept, *here], watch, carry, lost
        )
        return (i + 1, out.values[: last - first], out.carry), out.values[last - first :]

    state = (jnp.zeros((), jnp.int32), list(values[first:last]), carry)
    (_, final, carry), stacked = lax.scan(
        run, state, list(values[last:]), length, reverse, params["unroll"]
    )
    return Outcome([*final, *stacked], [*kept, *[None] * len(stacked)], carry)


def _while(eqn, values, trails, watch, carry, lost) -> Outcome:
    params = eqn.params
    head, consts = params["cond_nconsts"], params["body_nconsts"]
    test, body = params["cond_jaxpr"], params["body_jaxpr"]
    first = head + consts
    kept = _forwarded(body.jaxpr.invars[consts:], body.jaxpr.outvars, trails[first:])

    def again(state):
        return core.jaxpr_as_fun(test)(*values[:head], *state[0])[0]

    def run(state):
        inner, carry = state
        out = evaluate(
            body, [*values[head:first], *inner], [*trails[head:first], *kept], watch, carry, lost
        )
        return out.values, out.carry

    final, carry = lax.while_loop(again, run, (list(values[first:]), carry))
    return Outcome(final, kept, carry)


def _cond(eqn, values, trails, watch, carry, lost) -> Outcome:
    def branch(jaxpr):
        def run(operands, carry):
            out = evaluate(jaxpr, operands, trails[1:], watch, carry, lost)
            return out.values, out.carry

        return run

    branches = [branch(jaxpr) for jaxpr in eqn.params["branches"]]
    out, carry = lax.switch(values[0].astype(jnp.int32), branches, list(values[1:]), carry)
    return Outcome(out, [None] * len(out), carry)


def _forwarded(invars, outvars, trails) -> list[Trail | None]:
    """The trails of loop state that every turn hands on untouched."""
    return [
        trail if var is out else None
        for var, out, trail in zip(invars, outvars, trails, strict=False)
    ]


_LOOPS = {"scan": _scan, "while": _while, "cond": _cond}
