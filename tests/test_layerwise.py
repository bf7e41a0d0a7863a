"""Layerwise pruning against brute force, least squares and the published loop in NumPy."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from problems import error, inputs

import jaxprune as jp


def problem(rows=256, n=32, outputs=24, seed=0):
    """Inputs, a kernel (n, outputs), and the trees that the methods take."""
    x = inputs(rows, n, seed)
    w = np.random.default_rng(seed + 1).standard_normal((n, outputs))
    gram = jp.Gram(jnp.asarray(x.T @ x, jnp.float32), axes=(0,))
    return x, w, {"w": jnp.asarray(w, jnp.float32)}, {"w": gram}


def published(w, gram, keep_of_blocks=None, n_m=None, block=128, damping=0.01):
    """SparseGPT one column at a time, in float64; ``w`` is (outputs, n)."""
    w, gram = w.copy(), gram.copy()
    dead = np.diag(gram) == 0
    gram[dead, dead] = 1
    w[:, dead] = 0
    live = np.diag(gram)[~dead].mean()
    gram[~dead, ~dead] += damping * live
    upper = np.linalg.cholesky(np.linalg.inv(gram)).T
    mask = np.ones(w.shape, bool)
    n = w.shape[1]
    for at in range(0, n, block):
        stop = min(at + block, n)
        if n_m is None:
            scores = (w[:, at:stop] / np.diag(upper)[at:stop]) ** 2
            order = np.argsort(-scores.T.ravel(), kind="stable")
            flat = np.zeros(scores.size, bool)
            flat[order[: keep_of_blocks[at // block]]] = True
            mask[:, at:stop] = flat.reshape(scores.T.shape).T
        for i in range(at, stop):
            if n_m is not None and i % n_m[1] == 0:
                part = slice(i, i + n_m[1])
                order = np.argsort(-((w[:, part] / np.diag(upper)[part]) ** 2), axis=1)
                mask[:, part] = False
                np.put_along_axis(mask[:, part], order[:, : n_m[0]], True, 1)
            wrong = np.where(mask[:, i], 0, w[:, i]) / upper[i, i]
            w[:, i:] -= wrong[:, None] * upper[i, i:]
    return np.where(mask, w, 0), mask


@pytest.mark.parametrize("n_m", [None, (2, 4)])
@pytest.mark.parametrize("block", [8, 128])
def test_sparsegpt_is_the_published_loop(n_m, block):
    x, w, params, grams = problem(n=32)
    keep = [24 * min(block, 32) // 2] * (32 // min(block, 32))
    want, want_mask = published(w.T, x.T @ x, keep, n_m, min(block, 32))
    target = {"sparsity": 0.5} if n_m is None else {"n_m": n_m}
    new, masks = jp.sparsegpt(params, grams, **target, block=block)
    assert np.mean(want_mask == np.asarray(masks["w"]).T) > 0.99
    assert float(jp.density(masks)) == 0.5
    np.testing.assert_allclose(error(x, w, new["w"]), error(x, w, want.T), rtol=0.02)
    if np.array_equal(np.asarray(masks["w"]).T, want_mask):
        np.testing.assert_allclose(new["w"], want.T, rtol=1e-3, atol=1e-3)
    assert not np.asarray(new["w"])[~np.asarray(masks["w"])].any()


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.77, 1.0])
def test_counts_are_exact_where_blocks_do_not_divide(sparsity):
    _, w, params, grams = problem(n=21, outputs=5)
    for method in (partial(jp.sparsegpt, block=8), jp.alps):
        masks = method(params, grams, sparsity)[1]
        removed = int(np.floor(np.float32(sparsity) * w.size + 0.5))
        assert int(jnp.sum(~masks["w"])) == removed


def test_one_weight_is_removed_as_optimal_brain_surgeon_says():
    x, w, params, grams = problem(rows=64, n=6, outputs=1)
    inverse = np.linalg.inv(x.T @ x)
    new, masks = jp.sparsegpt(params, grams, 1 / 6, damping=0.0)
    gone = int(np.argmin(np.asarray(masks["w"])[:, 0]))
    # Those left of the removed weight are fixed, so the update runs over the columns from it on.
    rest = np.linalg.inv((x.T @ x)[gone:, gone:])
    want = w[:, 0].copy()
    want[gone:] -= w[gone, 0] / rest[0, 0] * rest[:, 0]
    np.testing.assert_allclose(new["w"][:, 0], want, atol=2e-4)
    fitted = jp.reconstruct(params, masks, grams)["w"][:, 0]
    surgeon = w[:, 0] - w[gone, 0] / inverse[gone, gone] * inverse[:, gone]
    np.testing.assert_allclose(fitted, surgeon, atol=2e-4)


@pytest.mark.parametrize("correlated", [False, True])
def test_reconstruct_is_least_squares(correlated):
    x, w, params, grams = problem(rows=512, n=24, outputs=10)
    if not correlated:
        x = np.random.default_rng(5).standard_normal(x.shape)
        grams = {"w": jp.Gram(jnp.asarray(x.T @ x, jnp.float32), axes=(0,))}
    masks = {"w": jnp.asarray(np.random.default_rng(3).random(w.shape) < 0.5)}
    new = np.asarray(jp.reconstruct(params, masks, grams)["w"], np.float64)
    for j in range(w.shape[1]):
        support = np.asarray(masks["w"])[:, j]
        best = np.linalg.lstsq(x[:, support], x @ w[:, j], rcond=None)[0]
        ours, least = (
            np.linalg.norm(x[:, support] @ found - x @ w[:, j]) for found in (new[support, j], best)
        )
        assert ours <= least * (1 + 1e-5)
        if not correlated:  # else the condition, 1e7, leaves float32 weights no digits to compare
            np.testing.assert_allclose(new[support, j], best, rtol=1e-4, atol=1e-4)
        assert not new[~support, j].any()


def test_alps_between_the_best_support_of_a_tiny_layer_and_sparsegpt():
    ratios = []
    for seed in range(6):
        x, w, params, grams = problem(rows=64, n=8, outputs=1, seed=seed)
        best = min(
            error(x, w[:, 0], np.put(z := np.zeros(8), list(s), fit) or z)
            for s in itertools.combinations(range(8), 4)
            for fit in [np.linalg.lstsq(x[:, s], x @ w[:, 0], rcond=None)[0]]
        )
        alps, greedy = (
            error(x, w, method(params, grams, 0.5)[0]["w"]) / best
            for method in (jp.alps, jp.sparsegpt)
        )
        assert 1 - 1e-4 <= alps < greedy
        ratios.append(alps)
    assert np.median(ratios) < 1.2


METHODS = {
    "alps": jp.alps,
    "sparsegpt": jp.sparsegpt,
    "wanda": jp.by_saliency(jp.wanda),
    "magnitude": jp.by_saliency(jp.magnitude, per_output=False),
}


@pytest.mark.parametrize("target", [{"sparsity": 0.5}, {"sparsity": 0.7}, {"n_m": (2, 4)}])
def test_more_work_makes_less_error(target):
    x, w, params, grams = problem(rows=512, n=64, outputs=48)
    errors = [error(x, w, method(params, grams, **target)[0]["w"]) for method in METHODS.values()]
    assert errors == sorted(errors)
    fitted = jp.reconstruct(params, METHODS["wanda"](params, grams, **target)[1], grams)
    assert error(x, w, fitted["w"]) < errors[2]


@pytest.mark.parametrize("name", METHODS)
def test_n_of_m_is_kept_along_the_fan_in(name):
    _, _, params, grams = problem()
    masks = METHODS[name](params, grams, n_m=(1, 4))[1]
    assert np.asarray(masks["w"]).reshape(8, 4, -1).sum(1).tolist() == [[1] * 24] * 8


def test_a_singular_gram_raises_with_the_path_and_dead_inputs_do_not():
    x, w, params, _ = problem(rows=8, n=32)
    grams = {"w": jp.Gram(jnp.asarray(x.T @ x, jnp.float32), axes=(0,))}
    with pytest.raises(ValueError, match=r"^w: .*more data or raise damping"):
        jp.sparsegpt(params, grams, 0.5, damping=0.0)
    with pytest.raises(ValueError, match=r"^w: "):
        jp.alps(params, grams, 0.5, damping=0.0)
    with pytest.raises(ValueError, match=r"^w: "):
        jp.reconstruct(params, {"w": jnp.ones(w.shape, bool)}, grams)
    x, w, params, _ = problem()
    x[:, 3] = 0
    grams = {"w": jp.Gram(jnp.asarray(x.T @ x, jnp.float32), axes=(0,))}
    for method in (jp.sparsegpt, jp.alps):
        new, _ = method(params, grams, 0.5)
        assert not np.asarray(new["w"])[3].any()
        assert error(x, w, new["w"]) < 0.5


def test_what_does_not_fit_is_refused():
    _, _, params, grams = problem()
    with pytest.raises(ValueError, match="either a sparsity or n_m"):
        jp.sparsegpt(params, grams)
    with pytest.raises(ValueError, match="either a sparsity or n_m"):
        jp.alps(params, grams, 0.5, n_m=(2, 4))
    with pytest.raises(ValueError, match="w: 5 does not divide"):
        jp.sparsegpt(params, grams, n_m=(2, 5))
    with pytest.raises(ValueError, match="w: a Gram of shape"):
        jp.sparsegpt({"w": jnp.ones((8, 4))}, grams, 0.5)
    with pytest.raises(TypeError, match=r"w: .*jp\.input_grams"):
        jp.sparsegpt(params, {"w": jnp.eye(32)}, 0.5)
    with pytest.raises(ValueError, match=r"sparsity is 1\.5"):
        jp.sparsegpt(params, grams, 1.5)
    with pytest.raises(ValueError, match="w: norms of shape"):
        jp.wanda(params, {"w": jnp.ones((1, 32))})


def test_ungoverned_leaves_and_dtypes_stay():
    _, _, params, grams = problem()
    params = {"w": params["w"].astype(jnp.bfloat16), "b": jnp.ones(3)}
    for method in METHODS.values():
        new, masks = method(params, {**grams, "b": None}, 0.5)
        assert new["w"].dtype == jnp.bfloat16
        assert masks["b"] is None
        assert new["b"] is params["b"]


def test_a_tree_of_sparsities_and_no_recompilation():
    _, _, params, grams = problem()
    both, two = {"a": params["w"], "b": params["w"]}, {"a": grams["w"], "b": grams["w"]}
    masks = jp.sparsegpt(both, two, {"a": 0.25, "b": 0.75})[1]
    assert [int(m.sum()) for m in masks.values()] == [576, 192]
    with jax.log_compiles(False):
        compiled = jax.jit(lambda s: jp.sparsegpt(params, grams, s)[1])
        kept = [int(compiled(jnp.float32(s))["w"].sum()) for s in (0.5, 0.75)]
    assert kept == [384, 192]
    assert compiled._cache_size() == 1


def test_eight_devices_equal_one():
    _, _, params, grams = problem()
    mesh = jax.make_mesh((8,), ("out",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = {"w": jax.device_put(params["w"], NamedSharding(mesh, P(None, "out")))}
    for method in (jp.sparsegpt, jp.alps):
        (one, masks), (many, masks_many) = method(params, grams, 0.5), method(sharded, grams, 0.5)
        np.testing.assert_array_equal(masks["w"], masks_many["w"])
        np.testing.assert_allclose(one["w"], many["w"], rtol=1e-3, atol=1e-4)


def test_owl_keeps_more_where_outliers_are():
    rng = np.random.default_rng(0)
    scores = {f"l{i}": jnp.asarray(rng.random((40, 50)) ** (1 + 3 * i)) for i in range(4)}
    keep = {name: int(k) for name, k in jp.allocate_owl(scores, 0.6).items()}
    assert sum(keep.values()) == 3200
    assert keep["l3"] > keep["l0"]
    assert max(keep.values()) - min(keep.values()) <= 2 * 0.08 * 2000 + 1
    flat = jp.allocate_owl({"a": jnp.ones(10), "b": jnp.ones(30)}, 0.5)
    assert [int(k) for k in flat.values()] == [5, 15]


def test_scores_that_are_nan_name_the_layer():
    params = {"a": jnp.eye(4)}
    nan = [jnp.full((5, 4), jnp.nan)]
    with pytest.raises(ValueError, match="a: its scores are NaN"):
        jp.prune_layerwise(
            lambda p, x: x @ p["a"], params, nan, 0.5, method=jp.by_saliency(jp.wanda)
        )
