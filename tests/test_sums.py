"""Sums that are the same in any order."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxprune import _sums


@given(st.integers(0, 999), st.integers(-90, 110), st.sampled_from([1, 3, 64, 500]))
def test_sums_are_near_exact_and_independent_of_order(seed, power, n):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(n, 4)) * 2.0 ** rng.uniform(-12, 0, (n, 4))).astype(np.float32)
    x = np.ldexp(x, power)
    found = np.asarray(_sums.reproducible_sum(jnp.asarray(x), (0,)))
    exact = np.array([[math.fsum(column) for column in x.T.astype(float)]])
    np.testing.assert_allclose(found, exact, rtol=3e-7, atol=np.abs(x).max() * n * 2.0**-34)
    shuffled = _sums.reproducible_sum(jnp.asarray(rng.permutation(x)), (0,))
    np.testing.assert_array_equal(shuffled, found)


def test_infinities_and_nan_pass():
    inf, nan = jnp.inf, jnp.nan
    x = jnp.array([[1.0, inf, -inf, inf, nan, 0.0], [2.0, 1.0, 1.0, -inf, 1.0, 0.0]])
    np.testing.assert_array_equal(
        _sums.reproducible_sum(x, (0,)), [[3.0, inf, -inf, nan, nan, 0.0]]
    )


def test_half_and_double():
    x = jnp.full((3, 100), 0.1, jnp.bfloat16)
    want = 100 * float(x[0, 0].astype(jnp.float32))
    np.testing.assert_allclose(_sums.reproducible_sum(x, (1,))[:, 0], want, rtol=1e-6)
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(50,)))
        found = float(_sums.reproducible_sum(x, (0,))[0])
        assert found == pytest.approx(math.fsum(np.asarray(x)), rel=1e-15)
