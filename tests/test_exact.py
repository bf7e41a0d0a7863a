"""The integer arithmetic against Python's own."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxprune import _exact

FRACTIONS = st.one_of(
    st.floats(0, 1, width=32),
    st.sampled_from([0.0, 1.0, 0.9, 0.95, 2.0**-49, 2.0**-50, 2.0**-63, 2.0**-64, 1e-12, 1e-40]),
)


def value(number):
    return (0 if number.high is None else int(number.high)) * 2**32 + int(number.low)


@given(FRACTIONS, st.one_of(st.integers(0, 2**63 - 1), st.integers(0, 2**32 - 1)))
def test_round_product_is_the_nearest_integer(fraction, n):
    exact = math.floor(Fraction(float(np.float32(fraction))) * n + Fraction(1, 2))
    assert value(_exact.round_product(np.float32(fraction), n)) == exact
    assert value(_exact.round_product(np.float32(fraction), _exact.constant(n))) == exact


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**40))
def test_arithmetic(a, b):
    x, y = _exact.constant(a), _exact.constant(b)
    assert value(_exact.add(x, y)) == a + b
    assert value(_exact.multiply(x.low, y.low)) == a % 2**32 * (b % 2**32)
    assert bool(_exact.less(x, y)) == (a < b)
    assert value(_exact.where(_exact.less(x, y), x, y)) == min(a, b)
    assert value(_exact.maximum(x, y)) == max(a, b)
    assert value(_exact.subtract(*((y, x) if a < b else (x, y)))) == abs(a - b)
    assert math.isclose(float(_exact.to_float(x)), a, rel_tol=1e-6)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**40))
def test_one_word_is_exact_beside_two(a, b):
    wide, other = _exact.constant(a), _exact.constant(b)
    small = _exact.up_to(a, wide)
    assert small.high is None
    assert _exact.up_to(2**32, other) is other
    assert value(_exact.up_to(2**32, small)) == a
    for x, y in ((small, other), (small, _exact.up_to(b, other))):
        assert bool(_exact.less(x, y)) == (a < b)
        assert bool(_exact.less(y, x)) == (b < a)
        rest = _exact.subtract(*((y, x) if a < b else (x, y)))
        assert value(rest) == abs(a - b)
    assert math.isclose(float(_exact.to_float(small)), a, rel_tol=1e-6)
    parts = jnp.asarray(np.array([a // 2, a - a // 2], np.uint32))
    assert int(_exact.total(parts, a).low[0]) == a
    assert _exact.total(parts, a).high is None


@pytest.mark.parametrize("n", [1, 73, 600])
def test_sums_before_in_one_word(n):
    rng = np.random.default_rng(n)
    values, rank = rng.integers(0, (2**32 - 1) // n, n, np.uint32), rng.permutation(n)
    found = _exact.before(jnp.asarray(values)[None], rank, int(values.sum(dtype=np.uint64)))
    assert found.high is None
    assert found.low[0].tolist() == [int(values[rank < mine].sum()) for mine in rank]


def words(n):
    return st.lists(st.integers(0, 2**32 - 1), min_size=n, max_size=n)


@given(st.sampled_from([1, 2, 32, 33, 40]).flatmap(words))  # every length compiles
def test_totals_pass_32_bits(values):
    number = _exact.from_uint32(jnp.asarray(np.array(values, np.uint32)))
    assert value(jax.tree.map(jnp.squeeze, _exact.total(number))) == sum(values)
    rank = np.random.default_rng(len(values)).permutation(len(values))
    before = _exact.before(jax.tree.map(lambda x: x[None], number), rank)
    found = [value(_exact.Wide(h, w)) for h, w in zip(before.high[0], before.low[0], strict=True)]
    assert found == [sum(v for v, r in zip(values, rank, strict=True) if r < mine) for mine in rank]
