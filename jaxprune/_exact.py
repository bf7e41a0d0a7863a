"""Exact unsigned integers beyond 32 bits, for totals over many leaves, without 64-bit types.

A number is a uint32 array whose leading axis holds its limbs in base 2^16, the least significant
first. Products and carries of 16-bit limbs fit in 32 bits, so nothing is ever rounded or lost, and
a number of weights past 2^31 is counted to the weight whether x64 is on or not.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Limbs = jax.Array

_BASE_BITS = 16
_LOW = np.uint32(0xFFFF)
_FRACTION_LIMBS = 5  # a float32 below 2^-49 rounds to no weight at all; 80 bits hold the others


def constant(value: int | Sequence[int] | np.ndarray, size: int) -> Limbs:
    """A Python integer, or a vector of them, as ``size`` limbs."""
    values = np.array(value, dtype=object)
    return jnp.asarray(
        np.array([values >> (_BASE_BITS * i) & 0xFFFF for i in range(size)], dtype=np.uint32)
    )


def from_uint32(value: jax.Array) -> Limbs:
    """A uint32 array as two limbs."""
    return jnp.stack([value & _LOW, value >> _BASE_BITS])


def to_uint32(number: Limbs) -> jax.Array:
    """The low 32 bits."""
    return number[0] | (number[1] << _BASE_BITS)


def to_float(number: Limbs) -> jax.Array:
    """The nearest float32, up to a few units in the last place."""
    places = np.float32(2.0) ** (_BASE_BITS * np.arange(len(number), dtype=np.float32))
    return jnp.tensordot(jnp.asarray(places), number.astype(jnp.float32), 1)


def carry(columns: jax.Array) -> Limbs:
    """Turn columns, each below 2^32 minus its carry, into limbs of as many places."""
    limbs, over = list[jax.Array](), np.uint32(0)
    for column in columns:
        column = column + over
        limbs.append(column & _LOW)
        over = column >> _BASE_BITS
    return jnp.stack(limbs)


def widen(number: Limbs, size: int) -> Limbs:
    """The same number in at least ``size`` limbs."""
    rows = max(0, size - len(number))
    return jnp.pad(number, [(0, rows), *((0, 0) for _ in number.shape[1:])])


def add(a: Limbs, b: Limbs) -> Limbs:
    """a + b, in one limb more than the longer."""
    a, b = _aligned(a, b, more=1)
    return carry(a + b)


def subtract(a: Limbs, b: Limbs) -> Limbs:
    """a - b for a >= b, in as many limbs as the longer."""
    a, b = _aligned(a, b)
    one = np.zeros((len(a), *(1,) * (jnp.ndim(a) - 1)), np.uint32)
    one[0] = 1
    return carry(a + (_LOW - b) + one)


def multiply(a: Limbs, b: Limbs) -> Limbs:
    """a * b, in ``len(a) + len(b)`` limbs."""
    a, b = _same_rank(a, b)
    size = len(a) + len(b)
    columns = jnp.zeros((size, *np.broadcast_shapes(a.shape[1:], b.shape[1:])), jnp.uint32)
    for place in range(len(a)):
        product = a[place : place + 1] * b
        rest = [(0, 0)] * (product.ndim - 1)
        columns = columns + jnp.pad(product & _LOW, [(place, size - place - len(b)), *rest])
        over = size - place - 1 - len(b)
        columns = columns + jnp.pad(product >> _BASE_BITS, [(place + 1, over), *rest])
    return carry(columns)


def less(a: Limbs, b: Limbs) -> jax.Array:
    """Whether a < b."""
    a, b = _aligned(a, b)
    result = jnp.zeros((), bool)
    for x, y in zip(a, b, strict=True):
        result = jnp.where(x == y, result, x < y)
    return result


def equal(a: Limbs, b: Limbs) -> jax.Array:
    """Whether a == b."""
    a, b = _aligned(a, b)
    return jnp.all(a == b, 0)


def where(condition: jax.Array, a: Limbs, b: Limbs) -> Limbs:
    """``a`` where the condition holds, else ``b``; both in as many limbs as the longer."""
    a, b = _aligned(a, b)
    return jnp.where(condition, a, b)


def total(number: Limbs) -> Limbs:
    """The sum over the last axis (up to 65,536 entries), in one limb more."""
    return carry(widen(jnp.sum(number, -1, dtype=jnp.uint32), len(number) + 1))


def cumulative(number: Limbs) -> Limbs:
    """The running sum over the last axis, in one limb more."""
    return carry(widen(jnp.cumsum(number, -1, dtype=jnp.uint32), len(number) + 1))


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
    return round_shift(multiply(n, jnp.stack(digits[::-1])), _FRACTION_LIMBS)


def _same_rank(a: Limbs, b: Limbs) -> tuple[Limbs, Limbs]:
    """Insert axes behind the limbs, so that numbers of different rank broadcast."""
    rank = max(jnp.ndim(a), jnp.ndim(b))
    return tuple(  # type: ignore[return-value]
        jnp.reshape(x, (len(x), *(1,) * (rank - jnp.ndim(x)), *x.shape[1:])) for x in (a, b)
    )


def _aligned(a: Limbs, b: Limbs, *, more: int = 0) -> tuple[Limbs, Limbs]:
    size = max(len(a), len(b)) + more
    return _same_rank(widen(a, size), widen(b, size))
