"""What moving data ties together: reshapes, slices, padding, lookups; and what makes new data."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend import core
from jax.lax import GatherScatterMode

from jaxprune._atoms import (
    CONSTANT,
    FREE,
    FROZEN,
    GROWS,
    Atoms,
    Rule,
    Value,
    freeze_all,
    opaque,
    shape_of,
    source_of,
    take_axes,
    unknown,
)

CLAMPED = (GatherScatterMode.CLIP, GatherScatterMode.PROMISE_IN_BOUNDS)
"""Lookups in which a slice of a whole axis always starts at its first position."""


def each(atoms: Atoms, eqn: core.JaxprEqn, ins: Sequence[Value]) -> list[Value]:
    """Operands come out as they went in."""
    del atoms, eqn
    return list(ins)


def broadcast_in_dim(atoms: Atoms, eqn: core.JaxprEqn, ins: Sequence[Value]) -> list[Value]:
    """New axes are free; an axis of size one that grows must stay, what it becomes is free."""
    value, shape = ins[0], shape_of(eqn.outvars[0])
    axes = [None] * len(shape)
    zero = [bool(value.const == 0)] * len(shape)
    for at, to in enumerate(eqn.params["broadcast_dimensions"]):
        if len(value.axes[at]) == shape[to]:
            axes[to], zero[to] = value.axes[at], value.is_zero(at)
        else:
            atoms.freeze(value.axes[at], GROWS)
    full = tuple(
        atoms.fresh(n, FREE) if axis is None else axis for axis, n in zip(axes, shape, strict=True)
    )
    return [Value(full, tuple(zero), value.const, value.source)]


def transpose(atoms: Atoms, eqn: core.JaxprEqn, ins: Sequence[Value]) -> list[Value]:
    del atoms
    return [take_axes(ins[0], eqn.params["permutation"])]


def squeeze(atoms: Atoms, eqn: core.JaxprEqn, ins: Sequence[Value]) -> list[Value]:
    gone = eqn.params["dimensions"]
    for axis in gone:
        atoms.freeze(ins[0].axes[axis], "an axis of size one that is dropped")
    return [take_axes(ins[0], [a for a in range(len(ins[0].axes)) if a not in gone])]


def reshape(atoms: Atoms, eqn: core.JaxprEqn, ins: Sequence[Value]) -> list[Value]:
    """Merged axes follow the outermost that is worth it, split ones become units of the outer."""
    value, shape = ins[0], shape_of(eqn.outvars[0])
    if eqn.params.get("dimensions") is not None:
        return unknown(atoms, eqn, ins)
    axes: list[Any] = [None] * len(shape)
    zero = [bool(value.const == 0)] * len(shape)
    for before, after in _chunks(value.shape, shape):
        if len(before) == len(after) == 1:
            axes[after[0]], zero[after[0]] = value.axes[before[0]], value.zero[before[0]]
            continue
        merged, merged_zero = _merge(atoms, [(value.axes[a], value.zero[a]) for a in before])
        if len(after) == 1:
            parts, carrier = [merged], 0
        else:
            parts, carrier = _split(atoms, merged, [shape[a] for a in after])
        for place, (axis, part) in enumerate(zip(after, parts, strict=True)):
            axes[axis], zero[axis] = part, merged_zero and place == carrier
    for axis, n in enumerate(value.shape):
        if n == 1 and shape.count(1) < value.shape.count(1):
            atoms.freeze(value.axes[axis], "an axis of size one that is dropped")
    ones = [a for a, n in enumerate(value.shape) if n == 1]
    for axis, n in enumerate(shape):
        if axes[axis] is None:
            kept = ones.pop(0) if shape.count(1) == value.shape.count(1) else None
            axes[axis] = atoms.fresh(n, FREE) if kept is None else value.axes[kept]
            zero[axis] = zero[axis] if kept is None else value.is_zero(kept)
    return [Value(tuple(axes), tuple(zero), value.const, value.source)]


def _chunks(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The finest matching of axes, those of size one left out."""
    if 0 in before:
        return []
    old = [a for a, n in enumerate(before) if n != 1]
    new = [a for a, n in enumerate(after) if n != 1]
    chunks = []
    while old:
        left, right = [old.pop(0)], [new.pop(0)]
        a, b = before[left[0]], after[right[0]]
        while a != b:
            if a < b:
                left.append(old.pop(0))
                a *= before[left[-1]]
            else:
                right.append(new.pop(0))
                b *= after[right[-1]]
        chunks.append((left, right))
    return chunks


def _merge(atoms: Atoms, parts: list[tuple[np.ndarray, bool]]) -> tuple[np.ndarray, bool]:
    """The atoms of several axes read as one: one axis carries, the others freeze."""
    if len(parts) == 1:
        return parts[0]
    ranks = [atoms.rank(axis) for axis, _ in parts]
    carrier = ranks.index(1) if 1 in ranks else ranks.index(0) if 0 in ranks else 0
    for place, (axis, _) in enumerate(parts):
        if place != carrier:
            atoms.freeze(axis, "the inner part of merged axes")
    outer = math.prod(len(axis) for axis, _ in parts[:carrier])
    inner = math.prod(len(axis) for axis, _ in parts[carrier + 1 :])
    return np.tile(np.repeat(parts[carrier][0], inner), outer), parts[carrier][1]


def _split(atoms: Atoms, merged: np.ndarray, sizes: Sequence[int]) -> tuple[list[np.ndarray], int]:
    """The axes that one axis becomes, and which of them carries its atoms.

    An axis along which alone the atoms vary carries them as they are; otherwise the outermost
    does, and what lies within one of its positions becomes one unit. Two or three outermost parts
    of several axes each are fused projections (queries, keys, values): the next axis carries.
    """
    grid = merged.reshape(sizes)
    carrier = int(len(sizes) > 2 and sizes[0] <= 3)
    for place in range(len(sizes)):
        front = np.moveaxis(grid, place, 0).reshape(sizes[place], -1)
        if (front == front[:, :1]).all():
            carrier = place
            break
    front = np.moveaxis(grid, carrier, 0).reshape(sizes[carrier], -1)
    kept = front[:, 0].copy()
    if not atoms.is_frozen(merged):
        atoms.unite(np.repeat(kept, front.shape[1]), front.ravel())
    return [
        kept if place == carrier else atoms.fresh(n, FROZEN, "the inner part of a split axis")
        for place, n in enumerate(sizes)
    ], carrier


def concatenate(atoms: Atoms, eqn: core.JaxprEqn, ins: Sequence[Value]) -> list[Value]:
    along = eqn.params["dimension"]
    axes, zero = [], []
    for axis in range(len(ins[0].axes)):
        every = [v.axes[axis] for v in ins]
        axes.append(np.concatenate(every) if axis == along else atoms.join(every))
        zero.append(all(v.is_zero(axis) for v in ins))
    const = ins[0].const if len({str(v.const) for v in ins}) == 1 else None
    return [Value(tuple(axes), tuple(zero), const, source_of(ins))]


def stack(atoms: Atoms, eqn: core.JaxprEqn, ins: Sequence[Value]) -> list[Value]:
    """The operands become positions of a new axis."""
    at, n = eqn.params["axis"], len(ins[0].axes)
    axes = [atoms.join([v.axes[a] for v in ins]) for a in range(n)]
    zero = [all(v.is_zero(a) for v in ins) for a in range(n)]
    axes.insert(at, atoms.fresh(len(ins), FROZEN, "values are stacked along this axis"))
    zero.insert(at, False)
    return [Value(tuple(axes), tuple(zero), None, source_of(ins))]


def unstack(atoms: Atoms, eqn: core.JaxprEqn, ins: Sequence[Value]) -> list[Value]:
    value, at = ins[0], eqn.params["axis"]
    atoms.freeze(value.axes[at], "values are stacked along this axis")
    rest = take_axes(value, [a for a in range(len(value.axes)) if a != at])
    return [rest] * len(eqn.outvars)


def tile(atoms: Atoms, eqn: core.JaxprEqn, ins: Sequence[Value]) -> list[Value]:
    del atoms
    axes = tuple(
        axis if times == 1 else np.tile(axis, times)
        for axis, times in zip(ins[0].axes, eqn.params["reps"], strict=True)
    )
    return [ins[0]._replace(axes=axes)]


def slice_(atoms: Atoms, eqn: core.JaxprEqn, ins: Sequence[Value]) -> list[Value]:
    del atoms
    value = ins[0]
    starts, ends = eqn.params["start_indices"], eqn.params["limit_indices"]
    steps = eqn.params["strides"] or (1,) * len(starts)
    axes = tuple(
        axis if (start, end, step) == (0, len(axis), 1) else axis[start:end:step]
        for axis, start, end, step in zip(value.axes, starts, ends, steps, strict=True)
    )
    return [value._replace(axes=axes)]


def split(atoms: Atoms, eqn: core.JaxprEqn, ins: Sequence[Value]) -> list[Value]:
    del atoms
    value, along = ins[0], eqn.params["axis"]
    pieces = np.split(value.axes[along], np.cumsum(eqn.params["sizes"])[:-1])
    return [
        value._replace(axes=(*value.axes[:along], piece, *value.axes[along + 1 :]))
        for piece in pieces
    ]


def rev(atoms: Atoms, eqn: core.JaxprEqn, ins: Sequence[Value]) -> list[Value]:
    del atoms
    turned = eqn.params["dimensions"]
    axes = tuple(a[::-1] if at in turned else a for at, a in enumerate(ins[0].axes))
    return [ins[0]._replace(axes=axes)]


def pad(atoms: Atoms, eqn: core.JaxprEqn, ins: Sequence[Value]) -> list[Value]:
    """Padding along an axis is new and free."""
    value, filler = ins
    axes, zero = [], []
    for axis, (low, high, inner) in enumerate(eqn.params["padding_config"]):
        where = padded_from(len(value.axes[axis]), low, high, inner)
        if len(where) == len(value.axes[axis]) and (where >= 0).all():
            axes.append(value.axes[axis])
        else:
            kind = FROZEN if atoms.is_frozen(value.axes[axis]) else FREE
            new = atoms.fresh(len(where), kind, "padding along a frozen axis")
            axes.append(np.where(where >= 0, value.axes[axis][where], new))
        zero.append(value.is_zero(axis) and (filler.const == 0 or axes[-1] is value.axes[axis]))
    const = value.const if value.const is not None and value.const == filler.const else None
    return [Value(tuple(axes), tuple(zero), const, source_of(ins))]


def padded_from(n: int, low: int, high: int, inner: int) -> np.ndarray:
    """For each position after padding, the position it had before, -1 for padding."""
    spread = np.full(n + max(n - 1, 0) * inner, -1)
    spread[:: inner + 1] = np.arange(n)
    spread = np.pad(spread, (max(low, 0), max(high, 0)), constant_values=-1)
    return spread[max(-low, 0) : len(spread) - max(-high, 0)]


def iota(atoms: Atoms, eqn: core.JaxprEqn, ins: Sequence[Value]) -> list[Value]:
    """Made at full size and sliced, so that every position keeps its number."""
    del ins
    return [atoms.value(shape_of(var), FREE, source=CONSTANT) for var in eqn.outvars]


def random_bits(atoms: Atoms, eqn: core.JaxprEqn, ins: Sequence[Value]) -> list[Value]:
    """Drawn at full size and sliced, so that every position keeps its draw."""
    freeze_all(atoms, ins, "an axis of random keys")
    return [atoms.value(shape_of(var), FREE) for var in eqn.outvars]


def dynamic_slice(atoms: Atoms, eqn: core.JaxprEqn, ins: Sequence[Value]) -> list[Value]:
    """Axes taken whole pass."""
    value = ins[0]
    axes = []
    for axis, n in zip(value.axes, eqn.params["slice_sizes"], strict=True):
        if n == len(axis):
            axes.append(axis)
        else:
            atoms.freeze(axis, "a dynamic slice runs along this axis")
            axes.append(atoms.fresh(n, FROZEN, "a dynamic slice runs along this axis"))
    zero = tuple(value.is_zero(a) for a in range(len(axes)))
    return [Value(tuple(axes), zero, value.const, source_of(ins))]


def dynamic_update_slice(atoms: Atoms, eqn: core.JaxprEqn, ins: Sequence[Value]) -> list[Value]:
    value, update = ins[:2]
    axes, zero = [], []
    for a, (axis, new) in enumerate(zip(value.axes, update.axes, strict=True)):
        if len(axis) == len(new):
            axes.append(atoms.join([axis, new]))
            zero.append(value.is_zero(a) and update.is_zero(a))
        else:
            for part in (axis, new):
                atoms.freeze(part, "a dynamic slice runs along this axis")
            axes.append(axis)
            zero.append(False)
    return [Value(tuple(axes), tuple(zero), None, source_of(ins))]


def gather(atoms: Atoms, eqn: core.JaxprEqn, ins: Sequence[Value]) -> list[Value]:
    """Axes taken whole pass, axes that are looked up freeze."""
    value, index = ins
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    looked_up = "looked up by index"
    atoms.freeze(index.axes[-1], "the numbers of an index")
    shape = shape_of(eqn.outvars[0])
    axes: list[Any] = [None] * len(shape)
    zero = [False] * len(shape)
    collapsed, batch = numbers.collapsed_slice_dims, numbers.operand_batching_dims
    offsets = [a for a in range(len(value.axes)) if a not in (*collapsed, *batch)]
    for a, to in zip(offsets, numbers.offset_dims, strict=True):
        free = a not in numbers.start_index_map or eqn.params["mode"] in CLAMPED
        if sizes[a] == len(value.axes[a]) and free:
            axes[to], zero[to] = value.axes[a], value.is_zero(a)
        else:
            atoms.freeze(value.axes[a], looked_up)
            axes[to] = atoms.fresh(shape[to], FROZEN, looked_up)
    for a in collapsed:
        atoms.freeze(value.axes[a], looked_up)
    for a, b in zip(batch, numbers.start_indices_batching_dims, strict=True):
        atoms.join([value.axes[a], index.axes[b]])
    rest = [to for to in range(len(shape)) if to not in numbers.offset_dims]
    for b, to in enumerate(rest):
        axes[to] = index.axes[b]
        if b in numbers.start_indices_batching_dims:
            at = batch[numbers.start_indices_batching_dims.index(b)]
            axes[to], zero[to] = atoms.join([index.axes[b], value.axes[at]]), value.is_zero(at)
    return [Value(tuple(axes), tuple(zero), value.const, source_of(ins))]


def scatter(atoms: Atoms, eqn: core.JaxprEqn, ins: Sequence[Value]) -> list[Value]:
    """Axes written whole pass, axes that are looked up freeze."""
    value, index, update = ins
    numbers = eqn.params["dimension_numbers"]
    looked_up = "written to by index"
    atoms.freeze(index.axes[-1], "the numbers of an index")
    inserted, batch = numbers.inserted_window_dims, numbers.operand_batching_dims
    windows = [a for a in range(len(value.axes)) if a not in (*inserted, *batch)]
    zero = [False] * len(value.axes)
    for a, b in zip(windows, numbers.update_window_dims, strict=True):
        same = len(value.axes[a]) == len(update.axes[b])
        if same and a not in numbers.scatter_dims_to_operand_dims:
            atoms.join([value.axes[a], update.axes[b]])
            zero[a] = value.is_zero(a) and update.is_zero(b)
        else:
            atoms.freeze(value.axes[a], looked_up)
            atoms.freeze(update.axes[b], looked_up)
    for a in inserted:
        atoms.freeze(value.axes[a], looked_up)
    rest = [b for b in range(len(update.axes)) if b not in numbers.update_window_dims]
    for at, b in enumerate(rest):
        atoms.join([index.axes[at], update.axes[b]])
    for a, b in zip(batch, numbers.scatter_indices_batching_dims, strict=True):
        atoms.join([value.axes[a], index.axes[b]])
    return [Value(value.axes, tuple(zero), None, source_of(ins))]


RULES: dict[str, Rule] = {
    name: opaque("an axis of random keys")
    for name in ("random_seed", "random_wrap", "random_unwrap", "random_split", "random_fold_in")
}
RULES |= {
    "optimization_barrier": each,
    "device_put": each,
    "broadcast_in_dim": broadcast_in_dim,
    "transpose": transpose,
    "squeeze": squeeze,
    "reshape": reshape,
    "concatenate": concatenate,
    "stack": stack,
    "unstack": unstack,
    "tile": tile,
    "empty": iota,
    "empty2": iota,
    "slice": slice_,
    "split": split,
    "rev": rev,
    "pad": pad,
    "iota": iota,
    "random_bits": random_bits,
    "dynamic_slice": dynamic_slice,
    "dynamic_update_slice": dynamic_update_slice,
    "gather": gather,
}
RULES |= {
    f"scatter{name}": scatter
    for name in ("", "-add", "-sub", "-mul", "-min", "-max", "_add", "_sub", "_mul", "_min", "_max")
}
