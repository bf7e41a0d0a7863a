"""Forms of code that compile fast, and that the CPU compiler makes fast."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_PARTS = 16
_ROW = 32
LINE = 64
"""Entries of the last axis that stay together."""
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


def divide(x: jax.Array, known: Any) -> jax.Array:
    """``x / known`` as a division rounds: one divisor for all would be turned into a factor.

    So each is chosen by what it divides, also under ``vmap``. NaN is NaN, whatever divides it.
    """
    return x / jnp.where(jnp.isnan(x), 1, jnp.asarray(known, x.dtype))


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
    least: Mapping[int, int] | None = None,
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
      least: how many lines of an axis stay, and what goes on dividing their number if it did, of
        primes up to 13; ``SHARDS`` where shards are not to mix.
    """
    least = least or {}
    while True:
        minors = {a: LINE if a == x.ndim - 1 else 1 for a in axes}
        whole = {a: x.shape[a] // n for a, n in minors.items() if x.shape[a] % n == 0}
        found = {a: _cut(n, least.get(a, 1), most) for a, n in whole.items()}
        cuts = {a: cut for a, cut in found.items() if cut is not None}
        if not cuts:
            return x
        axis = max(cuts, key=lambda a: (a != x.ndim - 1, x.shape[a]))
        groups, stay = cuts[axis]
        lines = whole[axis] // groups
        split = x.reshape(*x.shape[:axis], groups, lines, minors[axis], *x.shape[axis + 1 :])
        strips = [
            lax.slice_in_dim(split, first, min(first + stay, lines), axis=axis + 1)
            for first in range(0, lines, stay)
        ]
        most //= len(strips)
        while len(strips) > 1:
            pairs = zip(strips[::2], strips[1::2], strict=False)
            joined = [_combined(combine, *pair, axis + 1) for pair in pairs]
            strips = joined + strips[len(strips) // 2 * 2 :]
        x = strips[0].reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])


def unmixed(axes: tuple[int, ...]) -> dict[int, int]:
    """The least lines that ``fold`` leaves of axes where shards are not to mix."""
    return dict.fromkeys(axes, SHARDS)


def _cut(lines: int, least: int, most: int) -> tuple[int, int] | None:
    """Into how many groups lines are cut, and how many lines of each group stay.

    What divides the number of shards is small: other factors go first, and those of two last.
    """
    parts = min(_PARTS, lines // least, most)
    if parts < 2:
        return None
    other = lines
    for prime in (2, 3, 5, 7, 11, 13):
        while other % prime == 0:
            other //= prime
    if other > 1:
        return lines // other, -(-other // parts)
    fits = (n for n in range(parts, 1, -1) if lines % (n * math.gcd(lines, least)) == 0)
    return next(((lines // n, 1) for n in fits), None)


def _combined(
    combine: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, y: jax.Array, axis: int
) -> jax.Array:
    """Lines of two strips, of which the second may have fewer."""
    many = y.shape[axis]
    if x.shape[axis] == many:
        return combine(x, y)
    first = combine(lax.slice_in_dim(x, 0, many, axis=axis), y)
    return jnp.concatenate([first, lax.slice_in_dim(x, many, None, axis=axis)], axis)
