"""A weight of any rank as the matrix that its matmul sees: (*groups, outputs, fan-in)."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._walk import Use


def to_rows(leaf: jax.Array, use: Use) -> jax.Array:
    """``leaf`` as (*groups, outputs, fan-in)."""
    split, order = _order(leaf.shape, use)
    return leaf.reshape(split).transpose(order).reshape(*use.groups, -1, fan_in(leaf.shape, use))


def from_rows(rows: jax.Array, shape: Sequence[int], use: Use) -> jax.Array:
    """Undo ``to_rows``."""
    split, order = _order(shape, use)
    moved = rows.reshape([split[i] for i in order])
    return moved.transpose([int(i) for i in np.argsort(order)]).reshape(shape)


def to_features(values: jax.Array, shape: Sequence[int], use: Use) -> jax.Array:
    """(*groups, fan-in) as an array of the weight's rank: size one on output axes."""
    parts = dict(zip(use.stack, use.groups, strict=True))
    named = (*use.stack, *use.axes)
    values = values.reshape([*use.groups, *(shape[a] for a in use.axes)])
    values = values.transpose([int(i) for i in np.argsort(named)])
    values = values.reshape([parts.get(a, n if a in use.axes else 1) for a, n in enumerate(shape)])
    for axis, n in parts.items():
        values = jnp.repeat(values, shape[axis] // n, axis)
    return values


def fan_in(shape: Sequence[int], use: Use) -> int:
    """How many inputs an output has."""
    return math.prod(shape[a] for a in use.axes)


def _order(shape: Sequence[int], use: Use) -> tuple[list[int], list[int]]:
    """The shape with every stacked axis split into (groups, rest), and the order of ``to_rows``."""
    parts = dict(zip(use.stack, use.groups, strict=True))
    split: list[int] = []
    stacked: list[int] = []
    outputs: list[int] = []
    inputs: list[int] = []
    for axis, n in enumerate(shape):
        if axis in parts:
            stacked.append(len(split))
            split.append(parts[axis])
            n //= parts[axis]
        (inputs if axis in use.axes else outputs).append(len(split))
        split.append(n)
    return split, [*stacked, *outputs, *inputs]
