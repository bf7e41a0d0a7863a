"""Pruning in execution order, against pruning and recalibrating by hand."""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, monitoring
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from problems import error, inputs

import jaxprune as jp


def network(p, x):
    x = x + jax.jit(lambda x: jnp.tanh(x @ p["a"]["kernel"]))(x)
    return jax.checkpoint(lambda x: jnp.tanh(x @ p["b"]["kernel"]))(x) @ p["c"]["kernel"]


def weights(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) / 3, jnp.float32)


@pytest.fixture(scope="module")
def model():
    params = {name: {"kernel": weights(12, 12, seed=i)} for i, name in enumerate("abc")}
    return params, [jnp.asarray(inputs(40, 12, seed), jnp.float32) for seed in range(3)]


@pytest.mark.parametrize("target", [{"sparsity": 0.5}, {"n_m": (2, 4)}])
def test_prune_layerwise_is_pruning_and_recalibrating_by_hand(model, target):
    params, batches = model
    seen = []
    new, masks, log = jp.prune_layerwise(network, params, batches, **target, progress=seen.append)
    by_hand = params
    for name in "abc":
        only = jp.matching(f"{name}/kernel")
        grams = jp.input_grams(network, by_hand, batches, prunable=only)
        by_hand, _ = jp.sparsegpt(by_hand, grams, **target)
        np.testing.assert_allclose(
            new[name]["kernel"], by_hand[name]["kernel"], rtol=1e-2, atol=2e-3
        )
    assert float(jp.density(masks)) == 0.5
    assert [layer.path for layer in log] == ["a/kernel", "b/kernel", "c/kernel"]
    assert seen == log
    x = np.concatenate([np.asarray(b, np.float64) for b in batches])
    want = error(x, np.asarray(params["a"]["kernel"], np.float64), new["a"]["kernel"])
    np.testing.assert_allclose(log[0].error, want, rtol=1e-2)


def test_stacked_layers_are_pruned_one_by_one():
    stack, batches = weights(3, 8, 8), [jnp.asarray(inputs(40, 8), jnp.float32)]

    def scanned(p, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    def unrolled(p, x):
        for name in ("w0", "w1", "w2"):
            x = jnp.tanh(x @ p[name])
        return x

    separate = {f"w{i}": stack[i] for i in range(3)}
    new, masks, log = jp.prune_layerwise(scanned, {"w": stack}, batches, 0.5)
    want, _, _ = jp.prune_layerwise(unrolled, separate, batches, 0.5)
    for i in range(3):
        np.testing.assert_allclose(new["w"][i], want[f"w{i}"], rtol=1e-3, atol=1e-4)
    assert [layer.path for layer in log] == ["w[0]", "w[1]", "w[2]"]
    assert np.asarray(masks["w"]).sum((1, 2)).tolist() == [32] * 3


def test_donated_weights_are_gone_and_change_nothing():
    x = [jnp.asarray(inputs(40, 8), jnp.float32)]
    shared = weights(8, 8, seed=1)

    def apply(p, x):
        x = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["stack"])[0]
        return jnp.tanh(x @ p["alone"]) @ p["once"] + (x @ p["again"])

    def params():
        stack = {"stack": weights(3, 8, 8), "alone": weights(8, 8, seed=2)}
        return stack | {"once": shared, "again": shared}

    given, options = params(), {"sparsity": 0.5, "prunable": lambda *_: True}
    want = jp.prune_layerwise(apply, params(), x, **options)
    found = jp.prune_layerwise(apply, given, x, **options, donate=True)
    jax.tree.map(np.testing.assert_array_equal, found[:2], want[:2])
    gone = {name: leaf.is_deleted() for name, leaf in given.items()}
    assert gone == {"stack": True, "alone": True, "once": False, "again": False}
    with pytest.raises(ValueError, match="leave donate out"):
        jp.prune_layerwise(apply, params(), x, **options, donate=True, dense_targets=True)


def test_recurrent_and_repeated_weights_are_pruned_once():
    w, batches = weights(8, 8), [jnp.asarray(inputs(40, 8), jnp.float32)]

    def recurrent(p, x):
        return lax.scan(lambda h, _: (jnp.tanh(h @ p["w"]), None), x, None, length=3)[0]

    def repeated(p, x):
        return jnp.tanh(jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"]) @ p["w"])

    grams = jp.input_grams(recurrent, {"w": w}, batches)
    want, _ = jp.sparsegpt({"w": w}, grams, 0.5)
    for apply in (recurrent, repeated):
        new, _, log = jp.prune_layerwise(apply, {"w": w}, batches, 0.5)
        np.testing.assert_allclose(new["w"], want["w"], rtol=1e-3, atol=1e-3)
        assert len(log) == 1


def test_what_is_computed_from_pruned_weights_is_computed_anew(model):
    """Weight normalisation: norms of the pruned weights, and not of the dense ones."""
    params, batches = model

    def normalised(p, x):
        for name in "abc":
            w = p[name]["kernel"]
            x = jnp.tanh(x @ (w / jnp.sqrt(jnp.sum(w * w, 0, keepdims=True))))
        return x

    seen = {}

    def method(params, grams, sparsity):
        seen.update({path[0]: gram.matrix for path, gram in grams.items()})
        return jp.sparsegpt(params, grams, sparsity)

    new, _, _ = jp.prune_layerwise(normalised, params, batches, 0.5, method=method)
    so_far = dict(params)
    for name in "abc":
        want = jp.input_grams(normalised, so_far, batches)[name]["kernel"].matrix
        np.testing.assert_allclose(seen[name], want, rtol=1e-4, atol=1e-3)
        so_far[name] = new[name]


def test_activations_may_be_held_small_or_on_the_host(model):
    params, batches = model
    want, masks, _ = jp.prune_layerwise(network, params, batches, 0.5)
    new, _, _ = jp.prune_layerwise(network, params, batches, 0.5, on_host=True)
    np.testing.assert_array_equal(new["c"]["kernel"], want["c"]["kernel"])
    _, half, _ = jp.prune_layerwise(network, params, batches, 0.5, activation_dtype=jnp.bfloat16)
    assert np.mean(np.asarray(half["c"]["kernel"]) == np.asarray(masks["c"]["kernel"])) > 0.95


def test_batches_must_be_alike(model):
    params, batches = model
    with pytest.raises(ValueError, match=r"batch 1 is .*\[5,12\].*, the first .*\[40,12\]"):
        jp.prune_layerwise(network, params, [batches[0], batches[0][:5]], 0.5)
    with pytest.raises(ValueError, match="no batches"):
        jp.prune_layerwise(network, params, [], 0.5)
    with pytest.raises(TypeError, match=r"activation_dtype is .*int8"):
        jp.prune_layerwise(network, params, batches, 0.5, activation_dtype=jnp.int8)
    with pytest.raises(ValueError, match="either a sparsity or n_m"):
        jp.prune_layerwise(network, params, batches)


def test_progress_is_the_callers_and_nothing_is_shown(model, capfd):
    params, batches = model
    seen = []
    _, _, log = jp.prune_layerwise(network, params, batches, 0.5, progress=seen.append)
    assert seen == log
    assert [sorted(layer._fields) for layer in seen] == [["error", "path", "sparsity"]] * 3
    jp.prune_layerwise(network, params, batches, 0.5)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_and_functions_in_between(groups):
    params = {"conv": weights(3, 3, 4 // groups, 8), "out": weights(8, 5)}
    batches = [
        jnp.asarray(inputs(2 * 36, 4, seed).reshape(2, 6, 6, 4), jnp.float32) for seed in (0, 1)
    ]

    def apply(p, x):
        x = lax.conv_general_dilated(
            x,
            p["conv"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
        return jax.nn.silu(x).mean((1, 2)) @ p["out"]

    conv = jp.matching("conv")
    want, _ = jp.sparsegpt(params, jp.input_grams(apply, params, batches, prunable=conv), 0.5)
    new, _, _ = jp.prune_layerwise(apply, params, batches, 0.5, prunable=conv)
    np.testing.assert_allclose(new["conv"], want["conv"], rtol=1e-3, atol=1e-4)
    method = functools.partial(jp.sparsegpt, damping=0.1)
    _, masks, log = jp.prune_layerwise(apply, params, batches, 0.5, method=method)
    assert float(jp.density(masks)) == 0.5
    assert [layer.path for layer in log] == ["conv", "out"]


@pytest.mark.parametrize("dense_targets", [False, True])
def test_a_branch_is_pruned_as_what_it_runs(model, dense_targets):
    params, batches = model

    def branching(p, x):
        a = p["a"]["kernel"]
        h = lax.cond(x[0, 0] < 99, lambda w: jnp.tanh(x @ w), lambda w: 0 * (x @ w), a)
        return jax.checkpoint(lambda x: jnp.tanh(x @ p["b"]["kernel"]))(x + h) @ p["c"]["kernel"]

    options = {"sparsity": 0.5, "dense_targets": dense_targets}
    new, _, _ = jp.prune_layerwise(branching, params, batches, **options)
    want, _, _ = jp.prune_layerwise(network, params, batches, **options)
    for name in "abc":
        np.testing.assert_allclose(new[name]["kernel"], want[name]["kernel"], rtol=1e-3, atol=1e-3)


def residual(p, x):
    for layer in p:
        x = x + jnp.tanh(x @ layer["a"]) @ layer["b"]
    return x


def residual_scanned(p, x):
    def body(x, layer):
        return x + jnp.tanh(x @ layer["a"]) @ layer["b"], None

    return lax.scan(body, x, p)[0]


@pytest.fixture(scope="module")
def deep():
    layers = [{"a": weights(12, 24, seed=i), "b": weights(24, 12, seed=9 + i)} for i in range(3)]
    return layers, [jnp.asarray(inputs(300, 12, seed), jnp.float32) for seed in range(2)]


def test_dense_targets_bring_the_outputs_closer(deep):
    layers, batches = deep
    x = jnp.concatenate(batches)

    def off(**options):
        new, masks, _ = jp.prune_layerwise(residual, layers, batches, 0.5, **options)
        assert float(jp.density(masks)) == 0.5
        return float(jnp.mean((residual(new, x) - residual(layers, x)) ** 2))

    assert off(dense_targets=True) < 0.6 * off()


def test_dense_targets_are_least_squares_on_the_whole_sum(deep):
    """Only the first layers are pruned; the last matrix then has to make up for them."""
    layers, batches = deep
    x = np.concatenate([np.asarray(b, np.float64) for b in batches])

    def method(params, grams, sparsity):
        ((path, w),) = params.items()
        if path.endswith("2/b"):
            return params, {path: jnp.ones(w.shape, bool)}
        return jp.sparsegpt(params, grams, sparsity)

    new, _, _ = jp.prune_layerwise(
        residual, layers, batches, 0.5, method=method, dense_targets=True
    )
    before = np.asarray(residual(new[:2], jnp.asarray(x, jnp.float32)), np.float64)
    hidden = np.tanh(before @ np.asarray(new[2]["a"], np.float64))
    want = np.asarray(residual(layers, jnp.asarray(x, jnp.float32)), np.float64) - before
    dense = np.asarray(layers[2]["b"], np.float64)
    gram = hidden.T @ hidden
    damped = gram + 0.03 * np.mean(np.diag(gram)) * np.eye(24)
    best = dense + np.linalg.solve(damped, hidden.T @ (want - hidden @ dense))
    np.testing.assert_allclose(new[2]["b"], best, rtol=1e-3, atol=1e-3)


def test_dense_targets_of_stacked_layers_equal_those_of_separate_ones(deep):
    layers, batches = deep
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    want, _, _ = jp.prune_layerwise(residual, layers, batches, 0.5, dense_targets=True)
    new, _, _ = jp.prune_layerwise(residual_scanned, stacked, batches, 0.5, dense_targets=True)
    for i, layer in enumerate(want):
        np.testing.assert_allclose(new["a"][i], layer["a"], rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(new["b"][i], layer["b"], rtol=1e-3, atol=1e-3)


def test_dense_targets_where_weights_are_moved_and_biases_added(deep):
    layers, batches = deep
    turned = [
        {"a": p["a"].T, "b": p["b"].reshape(24, 3, 4), "c": jnp.ones(12, jnp.float32)}
        for p in layers
    ]
    biased = [{**p, "c": jnp.ones(12, jnp.float32)} for p in layers]

    def plain(p, x):
        for layer in p:
            x = jnp.tanh(x @ layer["a"]) @ layer["b"] + layer["c"][None] + x
        return x

    def moved(p, x):
        for layer in p:
            out = jnp.einsum("tf,fhd->thd", jnp.tanh(x @ layer["a"].T), layer["b"])
            x = x + (out.reshape(x.shape) + layer["c"][None])
        return x

    options = {"prunable": jp.matching("a|b"), "dense_targets": True}
    want, _, _ = jp.prune_layerwise(plain, biased, batches, 0.5, **options)
    new, _, _ = jp.prune_layerwise(moved, turned, batches, 0.5, **options)
    for ours, theirs in zip(new, want, strict=True):
        np.testing.assert_allclose(ours["a"].T, theirs["a"], rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(ours["b"].reshape(24, 12), theirs["b"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dense_targets", [False, True])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_eight_devices_equal_one(deep, kind, dense_targets):
    layers, batches = deep
    options = {"sparsity": 0.5, "dense_targets": dense_targets}
    batches = [b[:296] for b in batches]
    one, masks, _ = jp.prune_layerwise(residual, layers, batches, **options)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    with jax.sharding.set_mesh(mesh):
        everywhere = jax.device_put(layers, NamedSharding(mesh, P()))
        spread = [jax.device_put(b, NamedSharding(mesh, P("data"))) for b in batches]
        many, masks_many, _ = jp.prune_layerwise(residual, everywhere, spread, **options)
    kept = [
        np.mean(np.asarray(a) == np.asarray(b))
        for a, b in zip(*map(jax.tree.leaves, (masks, masks_many)), strict=True)
    ]
    assert min(kept) > 0.99
    x, many = batches[0], jax.tree.map(np.asarray, many)
    np.testing.assert_allclose(residual(one, x), residual(many, x), rtol=0.02, atol=0.02)


def decoder(layers):
    """The example's decoder with random weights: its module, parameters and tokens."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    try:
        import smollm2
    finally:
        sys.path.pop(0)
    width, inner, seed = 4 * smollm2.HEADS, 48, iter(range(1000))

    def kernel(*shape):
        return {"kernel": weights(*shape, seed=next(seed))}

    def norm():
        return {"scale": jnp.ones(width, jnp.float32)}

    small = 4 * smollm2.KV_HEADS
    shapes = {"q": (width, width), "k": (width, small), "v": (width, small), "o": (width, width)}
    mlp = {"gate": (width, inner), "up": (width, inner), "down": (inner, width)}
    params = {
        "embedding": weights(40, width),
        "layers": [
            {
                "attention": {"norm": norm(), **{k: kernel(*s) for k, s in shapes.items()}},
                "mlp": {"norm": norm(), **{k: kernel(*s) for k, s in mlp.items()}},
            }
            for _ in range(layers)
        ],
        "norm": norm(),
    }
    tokens = np.random.default_rng(0).integers(0, 40, (3, 2, 16)).astype(np.int32)
    return smollm2, params, list(tokens)


COMPILED = []
monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: COMPILED.append(seconds) if "backend_compile" in name else None
)


def test_a_decoder_is_pruned_and_equal_layers_share_compilations():
    def count(layers):
        smollm2, params, batches = decoder(layers)
        before = len(COMPILED)
        new, masks, log = jp.prune_layerwise(
            smollm2.apply, params, batches, 0.5, prunable=jp.matching("kernel"), dense_targets=True
        )
        compiled = len(COMPILED) - before
        assert len(log) == 7 * layers
        assert float(jp.density(masks)) == 0.5
        assert np.isfinite(smollm2.perplexity(new, np.concatenate(batches)))
        return compiled

    count(2)
    assert count(3) == count(5) > 0
