"""The integer arithmetic against Python's own."""

import math
from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxprune import _exact

FRACTIONS = st.one_of(
    st.floats(0, 1, width=32), st.sampled_from([0.0, 1.0, 0.9, 0.95, 2.0**-49, 2.0**-50, 1e-12])
)


def value(number):
    return sum(int(limb) << (16 * i) for i, limb in enumerate(number))


@given(FRACTIONS, st.integers(0, 2**45))
def test_round_product_is_the_nearest_integer(fraction, n):
    exact = math.floor(Fraction(float(np.float32(fraction))) * n + Fraction(1, 2))
    assert value(_exact.round_product(np.float32(fraction), n)) == exact


@given(st.integers(0, 2**60), st.integers(0, 2**40))
def test_arithmetic(a, b):
    x, y = _exact.constant(a, 4), _exact.constant(b, 3)
    assert value(_exact.add(x, y)) == a + b
    assert value(_exact.multiply(x, y)) == a * b
    assert bool(_exact.less(x, y)) == (a < b)
    assert bool(_exact.equal(x, y)) == (a == b)
    assert value(_exact.minimum(x, y)) == min(a, b)
    assert value(_exact.maximum(x, y)) == max(a, b)
    assert value(_exact.subtract(_exact.maximum(x, y), _exact.minimum(x, y))) == abs(a - b)
    assert value(_exact.round_shift(x, 1)) == (a + 2**15) >> 16
    assert math.isclose(float(_exact.to_float(x)), a, rel_tol=1e-6)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40))
def test_totals_pass_32_bits(values):
    number = _exact.from_uint32(np.array(values, np.uint32))
    assert value(_exact.total(number)) == sum(values)
    running = [value([limb[i] for limb in _exact.cumulative(number)]) for i in range(len(values))]
    assert running == list(np.cumsum(np.array(values, object)))
