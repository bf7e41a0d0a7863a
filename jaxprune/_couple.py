"""What each equation ties together: one rule per primitive, from input values to output values."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.extend import core

from jaxprune._atoms import CONSTANT, DATA, FREE, FROZEN, Atoms, Product, Value

Rule = Callable[[Atoms, core.JaxprEqn, Sequence[Value]], Sequence[Value]]

_ZERO_AT_ZERO = frozenset(
    "neg abs sign sqrt cbrt square tanh sin tan asin atan sinh asinh atanh erf erf_inv expm1 log1p "
    "floor ceil round convert_element_type copy copy_p real imag reduce_precision stop_gradient "
    "name sharding_constraint pvary mesh_cast "
    "add sub add_any or xor atan2 rem complex conj shift_left "
    "shift_right_logical shift_right_arithmetic".split()
)
_NOT_AT_ZERO = frozenset(
    "exp exp2 cos acos cosh acosh logistic log rsqrt lgamma digamma erfc is_finite not eq ne lt le max min and "
    "gt ge lt_to le_to nextafter pow clamp population_count clz bitcast_convert_type igamma "
    "igammac random_gamma_grad bessel_i0e bessel_i1e polygamma regularized_incomplete_beta".split()
)
_SINGULAR = frozenset("log rsqrt digamma lgamma".split())
_SAME_NUMBER = frozenset("convert_element_type copy copy_p stop_gradient name pvary".split())


def source_of(values: Sequence[Value]) -> int:
    """The one leaf that the values come from, else ``DATA``, or ``CONSTANT`` for none at all."""
    sources = {value.source for value in values} - {CONSTANT}
    return CONSTANT if not sources else sources.pop() if len(sources) == 1 else DATA


def literal(number: Any) -> Value:
    """A number in the text of the program."""
    return Value((), (), number, CONSTANT)


def freeze_all(atoms: Atoms, values: Sequence[Value], reason: str) -> None:
    """Nothing that these values carry may go."""
    for value in values:
        for axis in value.axes:
            atoms.freeze(axis, reason)


def unknown(atoms: Atoms, eqn: core.JaxprEqn, ins: Sequence[Value]) -> list[Value]:
    """Whatever the equation does, it sees everything at full size."""
    reason = f"unknown primitive {eqn.primitive.name}"
    freeze_all(atoms, ins, reason)
    return [
        atoms.value(shape_of(var), FROZEN, reason, source=source_of(ins)) for var in eqn.outvars
    ]


def shape_of(var: Any) -> tuple[int, ...]:
    """The full shape of a variable; empty for what is no array."""
    return tuple(getattr(var.aval, "shape", ()))


def elementwise(atoms: Atoms, eqn: core.JaxprEqn, ins: Sequence[Value]) -> list[Value]:
    """Position by position; scalars and axes of size one are broadcast."""
    name = eqn.primitive.name
    axes, zero = [], []
    for axis, n in enumerate(shape_of(eqn.outvars[0])):
        wide = [bool(v.axes) and len(v.axes[axis]) == n for v in ins]
        axes.append(atoms.join([v.axes[axis] for v, w in zip(ins, wide, strict=True) if w]))
        zeros = [v.const == 0 or (w and v.zero[axis]) for v, w in zip(ins, wide, strict=True)]
        zero.append(bool(_zero(name, eqn, ins, zeros)))
        if (name in _SINGULAR and zeros[0]) or (name == "div" and zeros[1]):
            atoms.spoil(axes[-1], f"{name} of a channel that masking makes zero")
    const = ins[0].const if name in _SAME_NUMBER else None
    return [Value(tuple(axes), tuple(zero), const, source_of(ins))]


def _zero(name: str, eqn: core.JaxprEqn, ins: Sequence[Value], zeros: Sequence[bool]) -> bool:
    """Whether the result is zero at removed positions, given where the operands are."""
    if name in ("mul", "and"):
        return any(zeros)
    if name == "div":
        return zeros[0] and not zeros[1]
    if name == "select_n":
        return all(zeros[1:])
    if name == "integer_pow":
        return zeros[0] and eqn.params["y"] > 0
    if name == "pow":
        exponent = ins[1].const
        return zeros[0] and exponent is not None and exponent > 0
    if name in ("max", "min", "clamp"):
        numbers = [0 if z else v.const for z, v in zip(zeros, ins, strict=True)]
        if any(number is None for number in numbers):
            return False
        if name == "clamp":
            return zeros[1] and numbers[0] <= 0 <= numbers[2]
        return any(zeros) and (max if name == "max" else min)(numbers) == 0
    return name in _ZERO_AT_ZERO and all(zeros)


def each(atoms: Atoms, eqn: core.JaxprEqn, ins: Sequence[Value]) -> list[Value]:
    """Operands come out as they went in."""
    del atoms, eqn
    return list(ins)


def broadcast_in_dim(atoms: Atoms, eqn: core.JaxprEqn, ins: Sequence[Value]) -> list[Value]:
    """New axes, and axes of size one that grow, are free."""
    value, shape = ins[0], shape_of(eqn.outvars[0])
    axes = [None] * len(shape)
    zero = [bool(value.const == 0)] * len(shape)
    for at, to in enumerate(eqn.params["broadcast_dimensions"]):
        if len(value.axes[at]) == shape[to]:
            axes[to], zero[to] = value.axes[at], value.is_zero(at)
    full = tuple(
        atoms.fresh(n, FREE) if axis is None else axis for axis, n in zip(axes, shape, strict=True)
    )
    return [Value(full, tuple(zero), value.const, value.source)]


def transpose(atoms: Atoms, eqn: core.JaxprEqn, ins: Sequence[Value]) -> list[Value]:
    del atoms
    return [_take_axes(ins[0], eqn.params["permutation"])]


def squeeze(atoms: Atoms, eqn: core.JaxprEqn, ins: Sequence[Value]) -> list[Value]:
    gone = eqn.params["dimensions"]
    for axis in gone:
        atoms.freeze(ins[0].axes[axis], "an axis of size one that is dropped")
    return [_take_axes(ins[0], [a for a in range(len(ins[0].axes)) if a not in gone])]


def _take_axes(value: Value, order: Sequence[int]) -> Value:
    axes, zero = (tuple(part[a] for a in order) for part in (value.axes, value.zero))
    return Value(axes, zero, value.const, value.source)


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
    does, and what lies within one of its positions becomes one unit.
    """
    grid = merged.reshape(sizes)
    carrier = 0
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


def opaque(reason: str) -> Rule:
    """A rule that freezes everything, for a reason."""

    def rule(atoms, eqn, ins):
        freeze_all(atoms, ins, reason)
        return [
            atoms.value(shape_of(var), FROZEN, reason, source=source_of(ins)) for var in eqn.outvars
        ]

    return rule


def reduction(atoms: Atoms, eqn: core.JaxprEqn, ins: Sequence[Value]) -> list[Value]:
    """Sums over zeros are exact, other reductions see what was there."""
    name, gone = eqn.primitive.name, eqn.params["axes"]
    for value in ins:
        for axis in gone:
            if name in ("argmax", "argmin"):
                atoms.freeze(value.axes[axis], f"{name} over this axis")
            elif name != "reduce_sum" or not value.is_zero(axis):
                atoms.spoil(value.axes[axis], f"{name} over this axis, which zeros take part in")
    rest = [a for a in range(len(ins[0].axes)) if a not in gone]
    sums = name in ("reduce_sum", "reduce_max", "reduce_min")
    value = _take_axes(ins[0], rest)
    return [
        Value(value.axes, tuple(sums and ins[0].is_zero(a) for a in rest), None, source_of(ins))
        for _ in eqn.outvars
    ]


def along(*names: str, why: str) -> Rule:
    """A rule for what runs along one axis and leaves the others alone."""

    def rule(atoms, eqn, ins):
        n = len(ins[0].axes)
        axis = next((eqn.params[name] for name in names if name in eqn.params), -1) % n
        whys = f"{eqn.primitive.name} {why}"
        axes = [atoms.join([v.axes[a] for v in ins]) for a in range(n)]
        atoms.freeze(axes[axis], whys)
        zero = tuple(all(v.is_zero(a) for v in ins) and a != axis for a in range(n))
        outs = []
        for var in eqn.outvars:
            size = shape_of(var)[axis]
            same = size == len(axes[axis])
            new = axes[axis] if same else atoms.fresh(size, FROZEN, whys)
            outs.append(Value((*axes[:axis], new, *axes[axis + 1 :]), zero, None, source_of(ins)))
        return outs

    return rule


def window(atoms: Atoms, eqn: core.JaxprEqn, ins: Sequence[Value]) -> list[Value]:
    """Pooling: axes with a window of one pass."""
    params = eqn.params
    sizes = params["window_dimensions"]
    ones = (1,) * len(sizes)
    factors = ("window_strides", "base_dilation", "window_dilation")
    values = [value for value in ins if len(value.axes) == len(sizes)]
    keeps = eqn.primitive.name in ("reduce_window_max", "reduce_window_min", "reduce_window_sum")
    outs = []
    for var in eqn.outvars:
        axes, zero = [], []
        for axis in range(len(sizes)):
            joined = atoms.join([value.axes[axis] for value in values])
            plain = sizes[axis] == 1 and tuple(params["padding"][axis]) == (0, 0)
            if plain and all((params.get(f) or ones)[axis] == 1 for f in factors):
                axes.append(joined)
                zero.append(keeps and values[0].is_zero(axis))
            else:
                atoms.freeze(joined, "a window slides along this axis")
                n = shape_of(var)[axis]
                axes.append(atoms.fresh(n, FROZEN, "a window slides along this axis"))
                zero.append(False)
        outs.append(Value(tuple(axes), tuple(zero), None, source_of(ins)))
    return outs


def dot_general(atoms: Atoms, eqn: core.JaxprEqn, ins: Sequence[Value]) -> list[Value]:
    """Contracted axes are one, and so are batch axes; the others pass."""
    (left_sum, right_sum), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    left, right = ins
    axes, zero = [], []
    summed = []
    for a, b in zip(left_sum, right_sum, strict=True):
        summed.append(atoms.join([left.axes[a], right.axes[b]]))
        if not (left.is_zero(a) or right.is_zero(b)):
            atoms.spoil(summed[-1], "a product sums over it where neither factor is zero")
    for a, b in zip(left_batch, right_batch, strict=True):
        axes.append(atoms.join([left.axes[a], right.axes[b]]))
        zero.append(left.is_zero(a) or right.is_zero(b))
    for value, used in ((left, (*left_sum, *left_batch)), (right, (*right_sum, *right_batch))):
        for axis in range(len(value.axes)):
            if axis not in used:
                axes.append(value.axes[axis])
                zero.append(value.is_zero(axis))
    leaf = max(left.source, right.source) if min(left.source, right.source) < 0 else right.source
    atoms.products.append(Product(2 * atoms.repeat, (*axes, *summed), leaf))
    return [Value(tuple(axes), tuple(zero), None, source_of(ins))]


def convolution(atoms: Atoms, eqn: core.JaxprEqn, ins: Sequence[Value]) -> list[Value]:
    """Input features are contracted, output features pass; with groups, whole groups go."""
    params, (left, right) = eqn.params, ins
    if params["batch_group_count"] != 1:
        return unknown(atoms, eqn, ins)
    groups = params["feature_group_count"]
    lhs, rhs, out = params["dimension_numbers"]
    feature, zero_out = right.axes[rhs[0]], right.is_zero(rhs[0])
    if groups == 1:
        entering = atoms.join([left.axes[lhs[1]], right.axes[rhs[1]]])
        if not (left.is_zero(lhs[1]) or right.is_zero(rhs[1])):
            atoms.spoil(entering, "a convolution sums over it where neither factor is zero")
    else:
        entering = right.axes[rhs[1]]
        atoms.freeze(entering, "inside a group of a grouped convolution")
        unit = feature.reshape(groups, -1)
        atoms.unite(np.repeat(unit[:, 0], unit.shape[1]), feature)
        whole = left.axes[lhs[1]].reshape(groups, -1)
        atoms.unite(np.repeat(unit[:, 0], whole.shape[1]), whole.ravel())
        zero_out = zero_out or left.is_zero(lhs[1])
    shape = shape_of(eqn.outvars[0])
    axes: list[Any] = [None] * len(shape)
    zero = [False] * len(shape)
    axes[out[0]], zero[out[0]] = left.axes[lhs[0]], left.is_zero(lhs[0])
    axes[out[1]], zero[out[1]] = feature, zero_out
    for a, b, to in zip(lhs[2:], rhs[2:], out[2:], strict=True):
        atoms.freeze(left.axes[a], "a window slides along this axis")
        atoms.freeze(right.axes[b], "the window of a convolution")
        axes[to] = atoms.fresh(shape[to], FROZEN, "a window slides along this axis")
    windows = [right.axes[b] for b in rhs[2:]]
    leaf = right.source if right.source >= 0 else left.source
    atoms.products.append(Product(2 * atoms.repeat, (*axes, entering, *windows), leaf))
    return [Value(tuple(axes), tuple(zero), None, source_of(ins))]


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
        if sizes[a] == len(value.axes[a]) and a not in numbers.start_index_map:
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
    name: elementwise
    for name in (*_ZERO_AT_ZERO, *_NOT_AT_ZERO, "mul", "div", "select_n", "integer_pow")
}
RULES |= {f"reduce_{name}": reduction for name in ("sum", "max", "min", "prod", "and", "or", "xor")}
RULES |= {f"reduce_window_{name}": window for name in ("max", "min", "sum")}
RULES |= {
    name: along("axis", why="along this axis")
    for name in ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
}
RULES |= {
    name: opaque("an axis of random keys")
    for name in ("random_seed", "random_wrap", "random_unwrap", "random_split", "random_fold_in")
}
RULES |= {
    "argmax": reduction,
    "argmin": reduction,
    "sort": along("dimension", why="along this axis"),
    "top_k": along("axis", "dimension", why="along this axis"),
    "approx_top_k": along("reduction_dimension", why="along this axis"),
    "broadcast_in_dim": broadcast_in_dim,
    "transpose": transpose,
    "squeeze": squeeze,
    "reshape": reshape,
    "concatenate": concatenate,
    "slice": slice_,
    "split": split,
    "rev": rev,
    "pad": pad,
    "iota": iota,
    "random_bits": random_bits,
    "optimization_barrier": each,
    "device_put": each,
    "reduce_window": window,
    "dot_general": dot_general,
    "conv_general_dilated": convolution,
    "dynamic_slice": dynamic_slice,
    "dynamic_update_slice": dynamic_update_slice,
    "gather": gather,
} | {f"scatter{name}": scatter for name in ("", "_add", "_mul", "_min", "_max", "-add", "-mul")}
