"""Sums that do not depend on the order of summation."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune import _loops, _placement, _tree

_WANTED_BITS = {jnp.dtype(jnp.float32): 36, jnp.dtype(jnp.float64): 72}


def reproducible_sum(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The sum over ``axes``, kept with size 1: the same bits on one device and on many.

    Scores are cut into integer digits relative to the largest of each sum, wide enough for at least
    36 bits (72 in float64) below it, and digits are added exactly. Powers of two scale through
    exactly.
    Reference: Demmel, Nguyen. Parallel Reproducible Summation, 2015.
    """
    x = lax.optimization_barrier(_tree.widen(x))  # or it is found again for every digit
    finite = jnp.isfinite(x)
    rest = jnp.where(finite, x, jnp.zeros((), x.dtype))
    largest = exponent(rest, axes)
    scaled = lax.optimization_barrier(times_power(rest, -largest))
    total = sum_of_digits(scaled, axes, by_lines=True)
    infinite = _by_lines(jnp.where(finite, jnp.zeros((), x.dtype), x), axes)
    return times_power(total, largest) + infinite


def sum_of_digits(x: jax.Array, axes: tuple[int, ...], *, by_lines: bool = False) -> jax.Array:
    """The same of numbers of sizes below one; a positive number more never makes it less.

    Integers are added ``by_lines``, which takes longer to compile, or else by a reduction, as
    floats where few are added, which vectorises.
    """
    whole: Any = jnp.int64 if x.dtype == jnp.float64 else jnp.int32
    terms = math.prod(x.shape[axis] for axis in axes)
    carries = max(0, terms - 1).bit_length()
    digit = np.iinfo(whole).bits - 2 - carries
    if not by_lines and jnp.finfo(x.dtype).nmant - carries >= _WANTED_BITS[x.dtype] // 3:
        whole, digit = x.dtype, jnp.finfo(x.dtype).nmant - carries
    if digit < 2:
        raise ValueError(f"a slice of shape {x.shape} along axes {axes} has too many weights")
    add = _by_lines if by_lines else partial(jnp.sum, keepdims=True)
    sums = []
    for _ in range(max(2, -(-_WANTED_BITS[x.dtype] // digit))):
        x = x * np.asarray(2.0**digit, x.dtype)
        digits = jnp.trunc(x)
        x = x - digits
        sums.append(add(digits.astype(whole), axes, dtype=whole))
    total = jnp.zeros((), x.dtype)
    for place in reversed(range(len(sums))):
        unit = np.asarray(2.0 ** -(digit * (place + 1)), x.dtype)
        total = total + sums[place].astype(x.dtype) * unit
    return total


def _by_lines(x: jax.Array, axes: tuple[int, ...], dtype: Any = None) -> jax.Array:
    """A sum that is exact in any order: lines of one device are added many at once."""
    least = {} if _placement.on_one_device(x) else _loops.unmixed(axes)
    return jnp.sum(_loops.fold(jnp.add, x, axes, least=least), axes, dtype=dtype, keepdims=True)


def exponent(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Of the power of two just above the largest size along ``axes``, which stay with size 1.

    Folded first, since a reduction to the largest runs an entry at a time.
    """
    sizes = _loops.fold(jnp.maximum, jnp.abs(x), axes, least=_loops.unmixed(axes))
    return jnp.frexp(jnp.max(sizes, axes, keepdims=True))[1]


def times_power(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """x 2^exponent in two steps, since one power of two may be out of range where x is not."""
    bits, mantissa, bias = (64, 52, 1023) if x.dtype == jnp.float64 else (32, 23, 127)
    half = exponent // 2
    for part in (half, exponent - half):
        biased = (part + bias).astype(f"uint{bits}") << mantissa
        x = x * lax.bitcast_convert_type(biased, x.dtype)
    return x
