"""Exact unsigned integers of 64 bits, for totals over many leaves, without 64-bit types.

A number is a pair of uint32 arrays of one shape, or one array where a bound is known that fits in
it, which is less code to compile. Nothing is ever rounded or lost, and weights past 2^31 are
counted to the weight whether x64 is on or not.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune import _loops

LARGEST = 2**63 - 1
"""What a number may be where it is to be multiplied by a fraction."""

_LOW = np.uint32(0xFFFF)
_FEW = 256  # numbers whose digits of 16 bits add up to floats that are exact
_SHIFTS = (0, 16, 8, 24)  # of digits; in order they would be computed, by code of their own


class Wide(NamedTuple):
    """``high * 2^32 + low``; without a high word below 2^32."""

    high: Any  # an array, or None
    low: jax.Array


def up_to(bound: int, number: Wide) -> Wide:
    """A number that is no larger than ``bound``: in one word if that fits, else in two."""
    if bound >> 32 == 0:
        return Wide(None, number.low)
    return from_uint32(number.low) if number.high is None else number


def constant(value: Any) -> Wide:
    """A Python integer, or an array of them as nested lists."""
    values = np.array(value, dtype=object)
    high, low = (np.array(part, np.uint32) for part in (values >> 32, values & 0xFFFFFFFF))
    return Wide(jnp.asarray(high), jnp.asarray(low))


def from_uint32(value: jax.Array) -> Wide:
    """A uint32 array."""
    return Wide(jnp.zeros_like(value), value)


def to_float(number: Wide) -> jax.Array:
    """The nearest float32, up to a unit in the last place."""
    low = number.low.astype(jnp.float32)
    if number.high is None:
        return low
    return number.high.astype(jnp.float32) * np.float32(2.0**32) + low


def add(a: Wide, b: Wide) -> Wide:
    """a + b, of two words."""
    low = a.low + b.low
    return Wide(a.high + b.high + (low < a.low).astype(jnp.uint32), low)


def subtract(a: Wide, b: Wide) -> Wide:
    """a - b for a >= b."""
    if a.high is None:
        return Wide(None, a.low - b.low)
    high = a.high if b.high is None else a.high - b.high
    return Wide(high - (a.low < b.low).astype(jnp.uint32), a.low - b.low)


def multiply(a: jax.Array, b: Any) -> Wide:
    """The product of two uint32 arrays."""
    (a1, a0), (b1, b0) = ((x >> 16, x & _LOW) for x in (a, b))
    outer, cross, other, inner = a1 * b1, a1 * b0, a0 * b1, a0 * b0
    middle = (inner >> 16) + (cross & _LOW) + (other & _LOW)
    high = outer + (cross >> 16) + (other >> 16) + (middle >> 16)
    return Wide(high, (inner & _LOW) | (middle << 16))


def less(a: Wide, b: Wide) -> jax.Array:
    """Whether a < b."""
    if a.high is None and b.high is None:
        return a.low < b.low
    a, b = (Wide(np.uint32(0), x.low) if x.high is None else x for x in (a, b))
    return (a.high < b.high) | ((a.high == b.high) & (a.low < b.low))


def where(condition: jax.Array, a: Wide, b: Wide) -> Wide:
    """``a`` where the condition holds, else ``b``."""
    return jax.tree.map(partial(_loops.where, condition), a, b)


def maximum(a: Wide, b: Wide) -> Wide:
    """The larger of two numbers."""
    return where(less(a, b), b, a)


def total(number: Wide | jax.Array, bound: int = LARGEST) -> Wide:
    """The sum over the last axis, which stays; of up to 65,536 numbers, or of a uint32 array.

    Sums past 32 bits are of digits of eight bits as floats, in which whole numbers up to 2^24 are
    exact.
    """
    if bound >> 32 == 0:
        sums = jnp.sum(_loops.grid(_low(number)), (-2, -1), dtype=jnp.uint32)
        return Wide(None, sums[..., None])
    if isinstance(number, Wide):
        return add(total(number.low), Wide(total(number.high).low, jnp.zeros((), jnp.uint32)))
    shifts = np.array(_SHIFTS, np.uint32).reshape(*[1] * (number.ndim - 1), -1, 1)
    digits = _digit(number[..., None, :], shifts)
    sums = jnp.sum(_loops.grid(digits), (-2, -1))
    return _of_digits(*(sums[..., i : i + 1] for i in range(4)))


def before(number: Wide | jax.Array, rank: np.ndarray, bound: int = LARGEST) -> Wide:
    """For every entry the sum of those of lower rank along the last axis, of up to 65,536.

    All of them add up to no more than ``bound``.
    """
    if bound >> 32 == 0:
        words = _low(number)
        if len(rank) > _FEW:
            return up_to(bound, before(words, rank))
        digits = jnp.concatenate([words & _LOW, words >> 16]).astype(jnp.int32)
        earlier = (rank[:, None] < rank).astype(np.float32)
        sums = jnp.matmul(digits.astype(jnp.float32), earlier, precision=lax.Precision.HIGHEST)
        lower, upper = jnp.split(sums.astype(jnp.int32).astype(jnp.uint32), 2)
        return Wide(None, lower + (upper << 16))
    if isinstance(number, Wide):
        low, high = before(number.low, rank), before(number.high, rank)
        return add(low, Wide(high.low, jnp.zeros_like(high.low)))
    ordered = number[:, np.argsort(rank)]
    digits = jnp.concatenate([_digit(ordered, np.uint32(shift)) for shift in _SHIFTS])
    lines = _loops.grid(digits)
    ahead = _sums_before(jnp.sum(lines, -1))
    sums = (_sums_before(lines) + ahead[..., None]).reshape(len(digits), -1)
    return _of_digits(*jnp.split(sums[:, rank], 4))


def _low(number: Wide | jax.Array) -> jax.Array:
    return number.low if isinstance(number, Wide) else number


def _sums_before(x: jax.Array) -> jax.Array:
    """Sums of earlier entries of the last axis, by a product: a scan takes longer to compile."""
    later = np.triu(np.ones((x.shape[-1], x.shape[-1]), np.float32), 1)
    return jnp.matmul(x, later, precision=lax.Precision.HIGHEST)


def _digit(number: jax.Array, shift: Any) -> jax.Array:
    return ((number >> shift) & np.uint32(255)).astype(jnp.int32).astype(jnp.float32)


def _of_digits(first: jax.Array, third: jax.Array, second: jax.Array, fourth: jax.Array) -> Wide:
    """The number whose digits of eight bits add up to these."""
    first, second, third, fourth = (
        digit.astype(jnp.int32).astype(jnp.uint32) for digit in (first, second, third, fourth)
    )
    byte = np.uint32(255)
    low = first + ((second & byte) << 8)
    middle = third + (second >> 8) + (low >> 16) + ((fourth & byte) << 8)
    return Wide((fourth >> 8) + (middle >> 16), (low & _LOW) | (middle << 16))


def round_product(fraction: Any, n: int | Wide) -> Wide:
    """floor(n * fraction + 1/2) for a float32 fraction in [0, 1] (others are clamped), exactly.

    The fraction is first rounded to float32; what follows is integer arithmetic, so the result is
    the same under jit and eager, and the nearest integer to the last unit.
    """
    bits = lax.clamp(np.float32(0), jnp.asarray(fraction, jnp.float32), np.float32(1))
    bits = lax.bitcast_convert_type(bits, jnp.uint32)
    mantissa = _loops.where(bits >> 23 > 0, (bits & np.uint32(0x7FFFFF)) | np.uint32(1 << 23), 0)
    # Of the product half is to be kept past a shift of 22 or more.
    shift = np.uint32(149) - (bits >> 23)
    if isinstance(n, int) and n >> 31 == 0:
        product = multiply(mantissa, jnp.asarray(np.uint32(n)))  # of 55 bits
        doubled = _shifted(product, jnp.minimum(shift, np.uint32(63)))
        return Wide(None, (doubled + np.uint32(1)) >> 1)
    number = constant(n) if isinstance(n, int) else n
    # It has three words, 87 bits, and nothing is left past a shift of 95.
    low = multiply(mantissa, number.low)
    upper = add(from_uint32(low.high), multiply(mantissa, number.high))
    words = [low.low, upper.low, upper.high, *[jnp.zeros_like(low.low)] * 2]
    shift = jnp.minimum(shift, np.uint32(95))
    words = [
        _loops.where(shift < 32, words[i], _loops.where(shift < 64, words[i + 1], words[i + 2]))
        for i in range(3)
    ]
    rest = shift & np.uint32(31)
    halves = Wide(*((words[i] >> rest) | ((words[i + 1] << 1) << (31 - rest)) for i in (1, 0)))
    rounded = Wide(halves.high >> 1, (halves.low >> 1) | (halves.high << 31))
    return add(rounded, from_uint32(halves.low & 1))


def _shifted(number: Wide, shift: jax.Array) -> jax.Array:
    """The low word of a number shifted by up to 63 bits."""
    rest = shift & np.uint32(31)
    near = (number.low >> rest) | ((number.high << 1) << (31 - rest))
    return _loops.where(shift < 32, near, number.high >> rest)
