"""Masks and what is done with them, against hand-worked examples and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxprune as jp

W = jnp.float32([[0.1, 0.5, 0.2], [0.3, 0.4, 0.0], [0.0, 0.6, 0.1]])


def test_threshold_by_hand():
    masks = jp.mask_threshold(jp.magnitude({"w": W}), 0.3)
    kept = jp.apply_masks({"w": W}, masks)["w"]
    np.testing.assert_array_equal(kept, np.float32([[0, 0.5, 0], [0, 0.4, 0], [0, 0.6, 0]]))
    gradient = jp.apply_masks({"w": jnp.ones((3, 3))}, masks)["w"]
    np.testing.assert_array_equal(gradient, [[0, 1, 0]] * 3)


def test_threshold_of_whole_slices():
    masks = jp.mask_threshold({"w": W}, 0.4, axes=0)["w"]  # column sums 0.4, 1.5, 0.3
    np.testing.assert_array_equal(masks, [[False, True, False]] * 3)
    masks = jp.mask_threshold({"w": W, "b": None}, 0.75, axes={"w": 1, "b": None})["w"]
    np.testing.assert_array_equal(masks, np.array([[True] * 3, [False] * 3, [False] * 3]))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_threshold_is_compared_in_float32(dtype):
    leaf = jnp.full((4,), 0.1, dtype)
    exact = float(leaf[0].astype(jnp.float32))
    assert not jp.mask_threshold({"w": leaf}, exact)["w"].any()
    assert jp.mask_threshold({"w": leaf}, np.nextafter(np.float32(exact), 0))["w"].all()


@given(st.data())
def test_topk_along_an_axis_spreads_the_count(data):
    shape = data.draw(st.sampled_from([(4, 6), (3, 2, 5), (8, 1)]))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    leaf = jnp.asarray(np.random.default_rng(0).normal(size=shape).round(1).astype(np.float32))
    keep = data.draw(st.integers(0, leaf.size))
    mask = np.asarray(jp.mask_topk({"w": leaf}, {"w": keep}, axis=axis)["w"])
    slices, scores = (
        np.moveaxis(np.asarray(x), axis, -1).reshape(-1, shape[axis]) for x in (mask, leaf)
    )
    assert mask.sum() == keep
    assert np.ptp(slices.sum(1)) <= 1
    for row, score in zip(slices, scores, strict=True):
        want = np.zeros(len(row), bool)
        want[np.argsort(-score, kind="stable")[: row.sum()]] = True
        np.testing.assert_array_equal(row, want)


def test_straight_through_masks_forward_and_not_backward():
    masks = {"w": W > 0.3, "b": None}
    params = {"w": W, "b": jnp.ones(3, jnp.float32)}

    def loss(p):
        p = jp.straight_through(p, masks)
        return jnp.sum(jnp.square(p["w"]) + p["b"][None, :] * p["w"])

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    masked = np.where(np.asarray(masks["w"]), np.asarray(W), 0)
    np.testing.assert_allclose(value, np.sum(masked**2 + masked), rtol=1e-6)
    np.testing.assert_allclose(grads["w"], 2 * masked + 1, rtol=1e-6)
    np.testing.assert_allclose(grads["b"], masked.sum(0), rtol=1e-6)


def test_masking_keeps_type_and_never_multiplies():
    params = {"w": jnp.array([jnp.inf, jnp.nan, 1.0], jnp.bfloat16), "n": jnp.arange(2)}
    out = jp.apply_masks(params, {"w": jnp.array([False, False, True]), "n": None})
    assert out["w"].dtype == jnp.bfloat16
    assert out["w"].tolist() == [0.0, 0.0, 1.0]
    assert out["n"] is params["n"]


def test_density_may_be_traced():
    masks = {"a": jnp.array([True, False, False]), "b": None, "c": jnp.ones(1, bool)}
    assert float(jax.jit(jp.density)(masks)) == 0.5


@pytest.mark.parametrize("n", [41, 47, 55, 5811])
def test_density_of_all_is_one(n):
    masks = {"a": jnp.ones(n, bool)}
    assert float(jax.jit(jp.density)(masks)) == float(jp.density(masks)) == 1
    seeds = {"a": jnp.ones((3, n), bool)}
    assert jax.jit(jax.vmap(jp.density))(seeds).tolist() == [1, 1, 1]


@given(st.lists(st.integers(1, 20), min_size=0, max_size=3), st.integers(0, 9))
def test_packing_is_lossless(shape, seed):
    mask = jnp.asarray(np.random.default_rng(seed).integers(0, 2, shape).astype(bool))
    params = {"w": jnp.zeros(shape), "b": jnp.zeros(2)}
    packed = jp.pack_masks({"w": mask, "b": None})
    again = jp.unpack_masks(packed, params)
    np.testing.assert_array_equal(again["w"], mask)
    assert again["b"] is None
    assert packed["w"].size <= max(1, mask.size)


@pytest.mark.parametrize(("n", "m", "axis"), [(2, 4, 0), (1, 2, -1), (3, 4, 1), (0, 2, 0)])
def test_n_of_m_by_counting(n, m, axis):
    leaf = jnp.asarray(np.random.default_rng(0).normal(size=(8, 12)).round(1).astype(np.float32))
    mask = np.moveaxis(np.asarray(jp.mask_n_m({"w": leaf}, n, m, axis=axis)["w"]), axis, -1)
    groups = np.moveaxis(np.asarray(leaf), axis, -1).reshape(-1, m)
    for row, group in zip(mask.reshape(-1, m), groups, strict=True):
        want = np.zeros(m, bool)
        want[np.argsort(-group, kind="stable")[:n]] = True
        np.testing.assert_array_equal(row, want)


def test_prune_reaches_the_sparsity_and_leaves_the_rest():
    params = {"kernel": jnp.arange(1.0, 101.0).reshape(10, 10), "bias": jnp.ones(10)}
    pruned, masks = jax.jit(jp.prune)(params, 0.9)
    assert int(masks["kernel"].sum()) == 10
    assert masks["bias"] is None
    np.testing.assert_array_equal(pruned["kernel"].ravel()[90:], np.arange(91.0, 101.0))
    np.testing.assert_array_equal(pruned["bias"], params["bias"])
    grads = jax.tree.map(lambda p: -p, params)
    by_gradient, _ = jp.prune(params, 0.5, saliency=jp.taylor, grads=grads)
    assert int(jnp.count_nonzero(by_gradient["kernel"])) == 50
