"""Exact unsigned integers beyond 32 bits, for totals over many leaves, without 64-bit types.

A number is a tuple of uint32 arrays, its limbs in base 2^16, the least significant first.
Products and carries of 16-bit limbs fit in 32 bits, so nothing is ever rounded or lost, and a
number of weights past 2^31 is counted to the weight whether x64 is on or not.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Limbs = tuple[jax.Array, ...]

_BASE_BITS = 16
_LOW = np.uint32(0xFFFF)
_FRACTION_LIMBS = 5  # a float32 below 2^-49 rounds to no weight at all; 80 bits hold the others


def constant(value: int | Sequence[int] | np.ndarray, size: int) -> Limbs:
    """A Python integer, or a vector of them, as ``size`` limbs."""
    values = np.array(value, dtype=object)
    return tuple(
        jnp.asarray(np.array(values >> (_BASE_BITS * i) & 0xFFFF, dtype=np.uint32))
        for i in range(size)
    )


def from_uint32(value: jax.Array) -> Limbs:
    """A uint32 array as two limbs."""
    return value & _LOW, value >> _BASE_BITS


def to_uint32(number: Limbs) -> jax.Array:
    """The low 32 bits."""
    return number[0] | (number[1] << _BASE_BITS)


def to_float(number: Limbs) -> jax.Array:
    """The nearest float32, up to a few units in the last place."""
    return sum(
        limb.astype(jnp.float32) * np.float32(2.0 ** (_BASE_BITS * i))
        for i, limb in enumerate(number)
    )  # type: ignore[return-value]


def carry(columns: Sequence[jax.Array]) -> Limbs:
    """Turn columns, each below 2^32 minus its carry, into limbs of as many places."""
    limbs, over = list[jax.Array](), jnp.zeros((), jnp.uint32)
    for column in columns:
        column = column + over
        limbs.append(column & _LOW)
        over = column >> _BASE_BITS
    return tuple(limbs)


def widen(number: Limbs, size: int) -> Limbs:
    """The same number in at least ``size`` limbs."""
    return number + tuple(jnp.zeros_like(number[0]) for _ in range(size - len(number)))


def add(a: Limbs, b: Limbs) -> Limbs:
    """a + b, in one limb more than the longer."""
    size = max(len(a), len(b)) + 1
    return carry([x + y for x, y in zip(widen(a, size), widen(b, size), strict=True)])


def subtract(a: Limbs, b: Limbs) -> Limbs:
    """a - b for a >= b, in as many limbs as the longer."""
    size = max(len(a), len(b))
    pairs = zip(widen(a, size), widen(b, size), strict=True)
    complement = [x + (_LOW - y) for x, y in pairs]
    return carry([complement[0] + np.uint32(1), *complement[1:]])


def multiply(a: Limbs, b: Limbs) -> Limbs:
    """a * b, in ``len(a) + len(b)`` limbs."""
    columns = [jnp.zeros((), jnp.uint32)] * (len(a) + len(b))
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            product = x * y
            columns[i + j] = columns[i + j] + (product & _LOW)
            columns[i + j + 1] = columns[i + j + 1] + (product >> _BASE_BITS)
    return carry(columns)


def less(a: Limbs, b: Limbs) -> jax.Array:
    """Whether a < b."""
    size = max(len(a), len(b))
    result = jnp.zeros((), bool)
    for x, y in zip(widen(a, size), widen(b, size), strict=True):
        result = jnp.where(x == y, result, x < y)
    return result


def equal(a: Limbs, b: Limbs) -> jax.Array:
    """Whether a == b."""
    size = max(len(a), len(b))
    result = jnp.ones((), bool)
    for x, y in zip(widen(a, size), widen(b, size), strict=True):
        result = result & (x == y)
    return result


def where(condition: jax.Array, a: Limbs, b: Limbs) -> Limbs:
    """``a`` where the condition holds, else ``b``; both in as many limbs as the longer."""
    size = max(len(a), len(b))
    pairs = zip(widen(a, size), widen(b, size), strict=True)
    return tuple(jnp.where(condition, x, y) for x, y in pairs)


def total(number: Limbs) -> Limbs:
    """The sum over the last axis (up to 65,536 entries), in one limb more."""
    return carry(
        [*(jnp.sum(limb, -1, dtype=jnp.uint32) for limb in number), jnp.zeros((), jnp.uint32)]
    )


def cumulative(number: Limbs) -> Limbs:
    """The running sum over the last axis, in one limb more."""
    sums = [jnp.cumsum(limb, -1, dtype=jnp.uint32) for limb in number]
    return carry([*sums, jnp.zeros_like(sums[0])])


def minimum(a: Limbs, b: Limbs) -> Limbs:
    """The smaller of two numbers."""
    return where(less(a, b), a, b)


def maximum(a: Limbs, b: Limbs) -> Limbs:
    """The larger of two numbers."""
    return where(less(a, b), b, a)


def round_shift(number: Limbs, limbs: int) -> Limbs:
    """floor(number / 2^(16 limbs) + 1/2)."""
    half = constant(1 << (_BASE_BITS * limbs - 1), limbs)
    return add(number, half)[limbs:]


def round_product(fraction: Any, n: int | Limbs) -> Limbs:
    """floor(n * fraction + 1/2) for a float32 fraction in [0, 1] (others are clamped), exactly.

    The fraction is first rounded to float32; what follows is integer arithmetic, so the result is
    the same under jit and eager, and the nearest integer to the last unit.
    """
    if isinstance(n, int):
        n = constant(n, max(1, math.ceil(n.bit_length() / _BASE_BITS)))
    rest = jnp.clip(jnp.asarray(fraction, jnp.float32), 0.0, 1.0)
    digits = []
    for _ in range(_FRACTION_LIMBS + 1):
        whole = jnp.floor(rest)
        digits.append(whole.astype(jnp.uint32))
        rest = (rest - whole) * np.float32(2.0**_BASE_BITS)
    return round_shift(multiply(n, tuple(reversed(digits))), _FRACTION_LIMBS)
