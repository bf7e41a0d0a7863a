"""One counting pass: float bits as keys, what a cut keeps of a leaf, and the sum of it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune import _placement

_ROWS = 64  # bytes summed before widening: at most 255, and few enough to divide sharded axes


def order(x: jax.Array, dtype: Any) -> jax.Array:
    """Unsigned keys, smaller for larger scores; both zeros are one key, NaN is the largest."""
    wide = jnp.dtype(dtype) == jnp.uint64
    bits = lax.bitcast_convert_type(x.astype(jnp.float64 if wide else jnp.float32), dtype)
    sign = np.asarray(1 << (63 if wide else 31), dtype)
    infinity = np.asarray(0x7FF << 52 if wide else 0xFF << 23, dtype)
    last = np.asarray((1 << (64 if wide else 32)) - 2, dtype)
    bits = jnp.where(bits == sign, np.zeros((), dtype), bits)
    key = jnp.where(bits < sign, (sign - np.ones((), dtype)) - bits, bits)
    return jnp.where((bits & ~sign) > infinity, last, key)


def view(order: jax.Array, index: jax.Array, key: jax.Array, end: jax.Array) -> jax.Array:
    """What the cut (key, end) keeps, a byte per weight."""
    kept = (order < key) | ((order == key) & (index.astype(end.dtype) < end))
    return kept.astype(jnp.uint8)


def indices(shape: tuple[int, ...], axes: tuple[int, ...]) -> Callable[[jax.Array], jax.Array]:
    """The position of every entry within its slice along ``axes``, in that order of axes."""

    def build(zero):
        index, stride = jnp.broadcast_to(zero, shape), 1
        for axis in reversed(axes):
            index = index + lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride)
            stride *= shape[axis]
        return index

    return build


def count(view: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Sum a view of bytes (0 or 1) over ``axes``, exactly, keeping them with size 1."""
    plan = None if _placement.explicitly_sharded(view) else byte_plan(view.shape, axes)
    if plan is None:
        return count_words(view, axes)
    return lax.platform_dependent(
        view,
        cpu=lambda v: count_bytes(v, axes, plan),
        default=lambda v: count_words(v, axes),
    )


def count_words(view: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.sum(view, axes, dtype=jnp.uint32, keepdims=True)


def count_bytes(view: jax.Array, axes: tuple[int, ...], plan: tuple[int, int, int]) -> jax.Array:
    """Sum up to 255 bytes as bytes first: on a CPU only sums of one type vectorise."""
    axis, rows, minor = plan
    shape = view.shape
    split = (*shape[:axis], shape[axis] // (rows * minor), rows, minor, *shape[axis + 1 :])
    partial = lax.reduce(view.reshape(split), np.uint8(0), lax.add, (axis + 1,))
    others = (a if a < axis else a + 1 for a in axes if a != axis)
    over = (*others, axis, axis + 1)
    sums = jnp.sum(partial, over, dtype=jnp.uint32)
    return sums.reshape([1 if a in axes else n for a, n in enumerate(shape)])


def byte_plan(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, int, int] | None:
    """Which axis to split into (rest, rows, minor) so that summing over rows is wide and exact."""
    best = None
    for axis in axes:
        last = axis == len(shape) - 1
        minor = _divisor(shape[axis], 512) if last and len(axes) == len(shape) else 1
        if minor == shape[axis] and last:
            minor = 1
        rows = _divisor(shape[axis] // minor, _ROWS)
        if rows >= 4 and (best is None or rows > best[1]):
            best = (axis, rows, minor)
    return best


def _divisor(n: int, most: int) -> int:
    return next(d for d in range(min(n, most), 0, -1) if n % d == 0)
