"""Forms of code that compile fast, and that the CPU compiler makes fast."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_PARTS = 16
_ROW = 32
_LINE = 64  # Entries of the last axis that stay together.
SHARDS = 64
"""As many shards of an axis hold whole lines where so many lines are left."""


def where(condition: Any, a: Any, b: Any) -> Any:
    """``jnp.where``, which is a call: to inline one takes the compiler longer than a selection.

    Of what is known before compiling it is NumPy's.
    """
    dtype = jnp.result_type(a, b)
    if not any(isinstance(x, jax.Array) for x in (condition, a, b)):
        return np.where(condition, a, b).astype(dtype)
    return lax.select(*jnp.broadcast_arrays(condition, *(jnp.asarray(x, dtype) for x in (a, b))))


def minus(x: jax.Array, known: Any) -> jax.Array:
    """``x - known``, of what is known before compiling: a sum, as the compiler makes it.

    It does so after it has moved what is known out of loops, and then goes over all once more.
    """
    return x + np.negative(np.asarray(known, x.dtype))


def as_type(x: jax.Array, dtype: Any) -> jax.Array:
    """Counts below 2^31 as another integer of 32 bits: there and back is nothing to compile."""
    return lax.bitcast_convert_type(x, dtype)


def apart(f: Callable[[Any], Any], x: Any, known: jax.Array) -> Any:
    """``f(x)`` from a loop of its own, whatever reads it.

    The CPU compiler fuses loops even where every element is then computed many times. Only a branch
    decided at run time keeps it from that: ``known`` is never 2^32 - 1, which no compiler knows.
    """

    def never(x):
        return jax.tree.map(jnp.zeros_like, f(x))

    return lax.cond(known != np.uint32(0xFFFFFFFF), f, never, x)


def total(x: jax.Array) -> jax.Array:
    """The sum of floats ``[1, n]``; sums of as many share their code."""
    return lax.optimization_barrier(jnp.sum(lax.optimization_barrier(x)))


def grid(x: jax.Array) -> jax.Array:
    """The last axis in rows of 32, zeros behind: a reduction over more is compiled as two."""
    rows = -(-x.shape[-1] // _ROW)
    behind = rows * _ROW - x.shape[-1]
    edges = [*[(0, 0, 0)] * (x.ndim - 1), (0, behind, 0)]
    x = lax.pad(x, jnp.zeros((), x.dtype), edges)
    return lax.optimization_barrier(x.reshape(*x.shape[:-1], rows, _ROW))


def fold(
    combine: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    axes: tuple[int, ...],
    *,
    most: int = 1 << 31,
    least: int = 1,
) -> jax.Array:
    """Combine entries along ``axes`` in a fixed order until few are left; other axes stay.

    A reduction over the last axis, or a strided one, runs an entry at a time; combining strips of
    the array runs over contiguous memory, many entries at once. Lines that lie together are
    combined, so that a sharded axis keeps its shards, and the result does not depend on them.

    Args:
      combine: two arrays to one.
      x: what to fold.
      axes: along which.
      most: how many entries become one.
      least: how many lines of an axis stay, and what goes on dividing their number if it did;
        ``SHARDS`` where shards are not to mix.
    """
    while True:
        minors = {a: _LINE if a == x.ndim - 1 else 1 for a in axes}
        lengths = {a: x.shape[a] // n for a, n in minors.items() if x.shape[a] % n == 0}
        choices = {
            a: next(
                (
                    p
                    for p in range(min(_PARTS, n // least, most), 1, -1)
                    if n % (p * math.gcd(n, least)) == 0
                ),
                1,
            )
            for a, n in lengths.items()
        }
        choices = {a: parts for a, parts in choices.items() if parts > 1}
        if not choices:
            return x
        axis = max(choices, key=lambda a: (a != x.ndim - 1, x.shape[a]))
        parts, minor = choices[axis], minors[axis]
        most //= parts
        split = x.reshape(*x.shape[:axis], -1, parts, minor, *x.shape[axis + 1 :])
        strips = [lax.index_in_dim(split, i, axis + 1, keepdims=False) for i in range(parts)]
        while len(strips) > 1:
            pairs = zip(strips[::2], strips[1::2], strict=False)
            strips = [combine(a, b) for a, b in pairs] + strips[len(strips) // 2 * 2 :]
        x = strips[0].reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])
