"""Sums that do not depend on the order of summation."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _loops, _tree

_WANTED_BITS = {jnp.dtype(jnp.float32): 36, jnp.dtype(jnp.float64): 72}


def reproducible_sum(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The sum over ``axes``, kept with size 1: the same bits on one device and on many.

    Scores are cut into integer digits relative to the largest, wide enough for at least 36 bits
    (72 in float64) below it, and digits are added exactly: as floats where few are added, which
    vectorises, else as integers. Powers of two scale through exactly.
    Reference: Demmel, Nguyen. Parallel Reproducible Summation, 2015.
    """
    x = _tree.widen(x)
    whole: Any = jnp.int64 if x.dtype == jnp.float64 else jnp.int32
    terms = math.prod(x.shape[axis] for axis in axes)
    carries = max(0, terms - 1).bit_length()
    digit = np.iinfo(whole).bits - 2 - carries
    if jnp.finfo(x.dtype).nmant - carries >= _WANTED_BITS[x.dtype] // 3:
        whole, digit = x.dtype, jnp.finfo(x.dtype).nmant - carries
    if digit < 2:
        raise ValueError(f"a slice of shape {x.shape} along axes {axes} has too many weights")
    finite = jnp.isfinite(x)
    rest = jnp.where(finite, x, jnp.zeros((), x.dtype))
    exponent = _exponent(rest)
    rest = _times_power(rest, -exponent)
    sums = []
    for _ in range(max(2, -(-_WANTED_BITS[x.dtype] // digit))):
        rest = rest * np.asarray(2.0**digit, x.dtype)
        digits = jnp.trunc(rest)
        rest = rest - digits
        sums.append(jnp.sum(digits.astype(whole), axes, dtype=whole, keepdims=True))
    total = jnp.zeros((), x.dtype)
    for place in reversed(range(len(sums))):
        unit = np.asarray(2.0 ** -(digit * (place + 1)), x.dtype)
        total = total + sums[place].astype(x.dtype) * unit
    infinite = jnp.sum(jnp.where(finite, jnp.zeros((), x.dtype), x), axes, keepdims=True)
    return _times_power(total, exponent) + infinite


def scaled(x: jax.Array) -> jax.Array:
    """Finite numbers times the power of two that brings the largest size below 1, at least 1/2."""
    return _times_power(x, -_exponent(x))


def _exponent(x: jax.Array) -> jax.Array:
    """Of the power of two just above the largest size.

    Folded first, since a reduction to the largest runs an entry at a time.
    """
    sizes = _loops.fold(jnp.maximum, jnp.abs(x), tuple(range(x.ndim)))
    return jnp.frexp(jnp.max(sizes))[1]


def _times_power(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """x 2^exponent in two steps, since one power of two may be out of range where x is not."""
    bits, mantissa, bias = (64, 52, 1023) if x.dtype == jnp.float64 else (32, 23, 127)
    half = exponent // 2
    for part in (half, exponent - half):
        biased = (part + bias).astype(f"uint{bits}") << mantissa
        x = x * jax.lax.bitcast_convert_type(biased, x.dtype)
    return x
