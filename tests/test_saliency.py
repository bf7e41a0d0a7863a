"""Criteria against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import KEY, SALIENCIES

import jaxprune as jp

X = jnp.asarray(np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32))
Y = jnp.asarray(np.random.default_rng(1).normal(size=(12, 2)).astype(np.float32))
PARAMS = {"kernel": jnp.float32([[0.5, -1.0], [2.0, 0.1], [-0.3, 0.7]]), "step": jnp.int32(3)}


def loss(params, x, y):
    return jnp.mean(jnp.square(x @ params["kernel"] - y))


def gradients(batches):
    kernel = np.asarray(PARAMS["kernel"], np.float64)
    out = []
    for x, y in batches:
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        out.append(2 * x.T @ (x @ kernel - y) / y.size)
    return np.stack(out)


BATCHES = [(X[:4], Y[:4]), (X[4:8], Y[4:8]), (X[8:], Y[8:])]


def test_snip_is_the_weight_times_the_mean_gradient():
    want = np.abs(np.asarray(PARAMS["kernel"]) * gradients(BATCHES).mean(0))
    scores = jp.snip(loss, PARAMS, iter(BATCHES))
    np.testing.assert_allclose(scores["kernel"], want, rtol=1e-5)
    assert scores["step"] is None


def test_fisher_is_half_the_squared_weight_times_the_mean_squared_gradient():
    want = 0.5 * np.square(np.asarray(PARAMS["kernel"])) * np.square(gradients(BATCHES)).mean(0)
    np.testing.assert_allclose(jp.fisher(loss, PARAMS, BATCHES)["kernel"], want, rtol=1e-5)


@pytest.mark.parametrize("criterion", [jp.snip, jp.fisher])
def test_batches_are_jitted_once_and_need_not_be_tuples(criterion):
    traces = []

    def single(params, batch):
        traces.append(1)
        return loss(params, batch["x"], batch["y"])

    batches = [{"x": x, "y": y} for x, y in BATCHES]
    scores = criterion(single, PARAMS, batches)
    assert len(traces) == 1
    np.testing.assert_array_equal(scores["kernel"], criterion(loss, PARAMS, BATCHES)["kernel"])


@pytest.mark.parametrize("criterion", [jp.snip, jp.fisher])
def test_no_batches_is_an_error(criterion):
    with pytest.raises(ValueError, match="batch"):
        criterion(loss, PARAMS, [])


def test_taylor_multiplies_in_float32():
    w, g = jnp.asarray([1e-3], jnp.float16), jnp.asarray([1e-4], jnp.float16)
    found = jp.taylor({"w": w}, {"w": g})["w"]
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, np.float64(w[0]) * np.float64(g[0]), rtol=1e-6)


def test_random_saliency_differs_by_key_and_leaf():
    params = {"a": jnp.ones((50,)), "b": jnp.ones((50,))}
    first = jp.random_saliency(params, key=KEY)
    assert not np.array_equal(first["a"], first["b"])
    assert not np.array_equal(first["a"], jp.random_saliency(params, key=jax.random.key(8))["a"])
    np.testing.assert_array_equal(first["a"], jp.random_saliency(params, key=KEY)["a"])


@pytest.mark.parametrize("name", SALIENCIES)
def test_ungoverned_leaves_pass_on_either_side(name):
    params = {"a": jnp.ones((2, 2)), "b": None}
    grads = {"a": jnp.ones((2, 2)), "b": jnp.ones(3)}
    scores = SALIENCIES[name](params, grads)
    assert scores["b"] is None
    assert scores["a"].shape == (2, 2)
