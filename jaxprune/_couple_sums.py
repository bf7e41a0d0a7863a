"""What arithmetic ties together: element by element, reductions, products, convolutions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend import core

from jaxprune._atoms import (
    FROZEN,
    GROWS,
    Atoms,
    Product,
    Rule,
    Value,
    shape_of,
    source_of,
    take_axes,
    unknown,
)

_ZERO_AT_ZERO = (
    *("neg", "abs", "sign", "sqrt", "cbrt", "square", "tanh", "sin", "tan", "asin", "atan", "sinh"),
    *(
        "asinh",
        "atanh",
        "erf",
        "erf_inv",
        "expm1",
        "log1p",
        "floor",
        "ceil",
        "round",
        "real",
        "imag",
    ),
    *("convert_element_type", "copy", "copy_p", "reduce_precision", "stop_gradient", "name"),
    *("sharding_constraint", "pvary", "mesh_cast", "add", "sub", "add_any", "or", "xor", "atan2"),
    *("rem", "complex", "conj", "shift_left", "shift_right_logical", "shift_right_arithmetic"),
)
_BY_CASES = ("mul", "and", "div", "select_n", "integer_pow", "pow", "max", "min", "clamp")
_NOT_AT_ZERO = (
    *("exp", "exp2", "cos", "acos", "cosh", "acosh", "logistic", "log", "log2", "rsqrt", "lgamma"),
    *("digamma", "erfc", "is_finite", "not", "eq", "ne", "lt", "le", "gt", "ge", "lt_to", "le_to"),
    *("eq_to", "nextafter", "population_count", "clz", "mulhi", "one_minus_square", "zeta"),
    *("igamma", "igammac", "igamma_grad_a", "random_gamma_grad", "bessel_i0e", "bessel_i1e"),
    *("polygamma", "regularized_incomplete_beta"),
)
_SINGULAR = ("log", "log2", "rsqrt", "digamma", "lgamma")
_SAME_NUMBER = ("convert_element_type", "copy", "copy_p", "stop_gradient", "name", "pvary")


def elementwise(atoms: Atoms, eqn: core.JaxprEqn, ins: Sequence[Value]) -> list[Value]:
    """Position by position; scalars and axes of size one are broadcast."""
    name = eqn.primitive.name
    axes, zero = [], []
    for axis, n in enumerate(shape_of(eqn.outvars[0])):
        wide = [bool(v.axes) and len(v.axes[axis]) == n for v in ins]
        axes.append(atoms.join([v.axes[axis] for v, w in zip(ins, wide, strict=True) if w]))
        for value, w in zip(ins, wide, strict=True):
            if value.axes and not w:
                atoms.freeze(value.axes[axis], GROWS)
        zeros = [v.const == 0 or (w and v.zero[axis]) for v, w in zip(ins, wide, strict=True)]
        if name == "select_n" and not ins[0].axes:  # NaN for all channels or for none
            zeros = [z or _is_nan(v.const) for z, v in zip(zeros, ins, strict=True)]
        zero.append(bool(_zero(name, eqn, ins, zeros)))
        if _is_singular(name, eqn, ins, zeros):
            atoms.spoil(axes[-1], f"{name} of a channel that masking makes zero")
    const = ins[0].const if name in _SAME_NUMBER else None
    return [Value(tuple(axes), tuple(zero), const, source_of(ins))]


def _is_singular(
    name: str, eqn: core.JaxprEqn, ins: Sequence[Value], zeros: Sequence[bool]
) -> bool:
    """Whether the function has no value where the operands are zero."""
    if name in ("div", "rem"):
        return zeros[1]
    if name == "integer_pow":
        return zeros[0] and eqn.params["y"] < 0
    if name == "pow":
        return zeros[0] and (ins[1].const is None or bool(ins[1].const < 0))
    return name in _SINGULAR and zeros[0]


def _is_nan(number: Any) -> bool:
    return number is not None and bool(number != number)


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


def bitcast(atoms: Atoms, eqn: core.JaxprEqn, ins: Sequence[Value]) -> Sequence[Value]:
    """The same bits as numbers of the same width; other widths change the last axis."""
    same = shape_of(eqn.outvars[0]) == ins[0].shape
    return elementwise(atoms, eqn, ins) if same else unknown(atoms, eqn, ins)


def reduction(atoms: Atoms, eqn: core.JaxprEqn, ins: Sequence[Value]) -> list[Value]:
    """Sums over zeros are exact, other reductions see what was there."""
    return [_reduce(atoms, eqn, value) for value in ins]


def collective(atoms: Atoms, eqn: core.JaxprEqn, ins: Sequence[Value]) -> Sequence[Value]:
    """Over an axis that ``vmap`` named a collective is a reduction, over devices it is not."""
    here = all(isinstance(axis, (int, np.integer)) for axis in eqn.params["axes"])
    whole = eqn.params.get("axis_index_groups") is None
    return reduction(atoms, eqn, ins) if here and whole else unknown(atoms, eqn, ins)


def _reduce(atoms: Atoms, eqn: core.JaxprEqn, value: Value) -> Value:
    name, gone = eqn.primitive.name, eqn.params["axes"]
    for axis in gone:
        if name in ("argmax", "argmin"):
            atoms.freeze(value.axes[axis], f"{name} over this axis")
        elif name not in ("reduce_sum", "psum") or not value.is_zero(axis):
            atoms.spoil(value.axes[axis], f"{name} over this axis, which zeros take part in")
    left = take_axes(value, [a for a in range(len(value.axes)) if a not in gone])
    zeros = name in ("reduce_sum", "reduce_max", "reduce_min", "psum", "pmax", "pmin")
    kept = tuple(zeros and left.is_zero(a) for a in range(len(left.axes)))
    return Value(left.axes, kept, None, value.source)


def along(*names: str) -> Rule:
    """A rule for what runs along one axis and leaves the others alone."""

    def rule(atoms, eqn, ins):
        n = len(ins[0].axes)
        axis = next((eqn.params[name] for name in names if name in eqn.params), -1) % n
        whys = f"{eqn.primitive.name} along this axis"
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


RULES: dict[str, Rule] = dict.fromkeys((*_ZERO_AT_ZERO, *_BY_CASES, *_NOT_AT_ZERO), elementwise)
RULES |= {f"reduce_{name}": reduction for name in ("sum", "max", "min", "prod", "and", "or", "xor")}
RULES |= dict.fromkeys(("psum", "pmax", "pmin"), collective)
RULES |= {f"reduce_window_{name}": window for name in ("max", "min", "sum")}
RULES |= {name: along("axis") for name in ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")}
RULES |= {
    "bitcast_convert_type": bitcast,
    "argmax": reduction,
    "argmin": reduction,
    "sort": along("dimension"),
    "top_k": along("axis", "dimension"),
    "approx_top_k": along("reduction_dimension"),
    "reduce_window": window,
    "dot_general": dot_general,
    "conv_general_dilated": convolution,
}
