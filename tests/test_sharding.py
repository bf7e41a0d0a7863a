"""Masks of sharded scores equal one device's, and what crosses the wire does not grow."""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import ALLOCATIONS, KEY
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from jaxprune import _counting

DTYPE_PROMOTION = "standard"  # optax promotes
SPECS = {
    "rows": P("x", None),
    "columns": P(None, "y"),
    "both": P("x", "y"),
    "joint": P(("x", "y"), None),
    "none": P(None, None),
}


def mesh(kind):
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))


def tree(seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: {"kernel": rng.normal(size=(64, 48)).round(1).astype(np.float32)} for name in SPECS
    }


def place(values, where):
    return {
        name: jax.device_put(leaf, NamedSharding(where, SPECS[name]))
        for name, leaf in values.items()
    }


def sharded(values, where):
    return {
        name: {"kernel": jax.device_put(leaf["kernel"], NamedSharding(where, SPECS[name]))}
        for name, leaf in values.items()
    }


def same_sharding(masks, params):
    def check(mask, param):
        assert mask.sharding.is_equivalent_to(param.sharding, mask.ndim), (mask.sharding, param)

    jax.tree.map(check, masks, params)


MAKERS = {
    **{
        f"topk_{name}": lambda s, allocate=allocate: jp.mask_topk(s, allocate(s, 0.8))
        for name, allocate in ALLOCATIONS.items()
    },
    "slices": lambda s: jp.mask_topk(s, jp.allocate_uniform(s, 0.8), axis=0),
    "groups": lambda s: jp.mask_groups(s, jp.allocate_uniform(s, 0.8), axes=0),
    "blocks": lambda s: jp.mask_blocks(s, jp.allocate_uniform(s, 0.8), block=4),
    "n_m": lambda s: jp.mask_n_m(s, 2, 4, axis=0),
    "threshold": lambda s: jp.mask_threshold(s, 0.5),
}


@cache
def on_one_device(maker):
    return jax.jit(MAKERS[maker])(jax.tree.map(jnp.asarray, tree()))


@pytest.mark.usual("Auto", "global", "lamp", "slices")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("maker", MAKERS)
def test_masks_equal_one_device(maker, kind):
    want, where = on_one_device(maker), mesh(kind)
    with jax.sharding.set_mesh(where):
        params = sharded(tree(), where)
        found = jax.jit(MAKERS[maker])(params)
    jax.tree.map(np.testing.assert_array_equal, found, want)


def collectives(text):
    """``(name, bytes)`` of every collective in a compiled program."""
    sizes = {"pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f16": 2, "u32": 4, "s32": 4, "f32": 4}
    pattern = r"= (.*?) (all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)\("
    found = []
    for shapes, name in re.findall(pattern, text):
        total = sum(
            sizes.get(kind, 8) * int(np.prod([int(d) for d in dims.split(",") if d] or [1]))
            for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        )
        found.append((name, total))
    return found


@pytest.mark.parametrize(
    ("kind", "shape", "spec"),
    [
        (AxisType.Auto, (544, 512), P(("y", "x"))),
        (AxisType.Auto, (8, 409_600), P(None, ("x", "y"))),
        (AxisType.Explicit, (800, 512), P("x")),
    ],
)
def test_large_leaves_whose_strips_would_cross_shards(kind, shape, spec):
    """Shards divide the axis, but not the strips that one device adds along it."""
    where, mask = mesh(kind), jax.jit(lambda x: jp.mask_topk({"w": x}, {"w": 9_999})["w"])
    leaf = np.random.default_rng(0).normal(size=(2, *shape)).round(2).astype(np.float32)
    want = [mask(jnp.asarray(part)) for part in leaf]
    with jax.sharding.set_mesh(where):
        seeds = jax.device_put(leaf, NamedSharding(where, P(None, *spec)))
        sent = collectives(mask.lower(seeds[0]).compile().as_text())
        np.testing.assert_array_equal(mask(seeds[0]), want[0])
        np.testing.assert_array_equal(jax.jit(jax.vmap(mask))(seeds), want)
    assert all(name == "all-reduce" and size <= 64 for name, size in sent)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((1 << 25,), P(("x", "y"))),
        ((4096, 16_384), P("x")),
        ((4096, 16_384), P("x", "y")),
        ((512, 151_936), P("y", "x")),
    ],
)
@pytest.mark.parametrize(
    ("kind", "on_cpu"),
    [(AxisType.Auto, True), (AxisType.Auto, False), (AxisType.Explicit, False)],
)
def test_shards_of_any_width_send_a_number_a_cut(kind, on_cpu, shape, spec):
    """More weights than a float counts, in rows of any length: compiled, not run."""
    where, axes = mesh(kind), tuple(range(len(shape)))
    cut = jax.ShapeDtypeStruct((2, *[1] * len(shape)), jnp.uint32)
    with jax.sharding.set_mesh(where):
        leaf = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(where, spec))
        count = jax.jit(partial(_counting.count, on_cpu, axes=axes, grain=0))
        step = jax.ShapeDtypeStruct((), jnp.int32)
        compiled = count.lower(leaf, _counting.Cut(cut, cut), step).compile()
    sent = collectives(compiled.as_text())
    assert sent
    assert all(name == "all-reduce" and size <= 8 for name, size in sent)


TRANSFORMS = {
    "gradual_global": lambda: jp.prune_gradually(
        optax.adam(1e-2), 0.8, when=jp.every(1), allocate=jp.allocate_global
    ),
    "gradual_lamp": lambda: jp.prune_gradually(
        optax.adam(1e-2), 0.8, when=jp.every(1), allocate=jp.allocate_lamp
    ),
    "gradual_packed": lambda: jp.prune_gradually(
        optax.adam(1e-2), 0.8, when=jp.every(1), packed=True
    ),
    "below": lambda: jp.prune_below(optax.adam(1e-2), 0.5, when=jp.every(1)),
    "rigl": lambda: jp.rigl(optax.adam(1e-2), 0.8, drop_fraction=0.3, when=jp.every(1), key=KEY),
    "evolutionary": lambda: jp.sparse_evolutionary(
        optax.adam(1e-2), 0.8, drop_fraction=0.3, when=jp.every(1), key=KEY
    ),
    "movement": lambda: jp.prune_gradually(
        optax.adam(1e-2), 0.8, when=jp.every(1), saliency=jp.movement
    ),
    "ac_dc": lambda: jp.ac_dc(optax.adam(1e-2), 0.8, begin=0, period=1, end=4),
    "granet": lambda: jp.granet(optax.adam(1e-2), 0.8, when=jp.every(1), key=KEY),
    "straight_through": lambda: jp.train_straight_through(optax.adam(1e-2), 0.8, when=jp.every(1)),
    "sr_ste": lambda: jp.sr_ste(optax.adam(1e-2), 0.8, when=jp.every(1)),
    "top_kast": lambda: jp.top_kast(optax.adam(1e-2), 0.8, when=jp.every(1)),
}


@pytest.mark.usual("Auto", "gradual", "rigl")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("method", TRANSFORMS)
def test_training_keeps_shardings_and_sends_little(method, kind):
    tx, values, where = TRANSFORMS[method](), tree(), mesh(kind)
    with jax.sharding.set_mesh(where):
        params, grads = sharded(values, where), sharded(tree(1), where)
        state = jax.jit(tx.init)(params)
        if not method.endswith("packed"):
            same_sharding(jp.get_masks(state, params), params)

        @jax.jit
        def step(params, state):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        compiled = step.lower(params, state).compile()
        new, state = compiled(params, state)
        same_sharding(new, params)
        if not method.endswith("packed"):
            same_sharding(jp.get_masks(state, params), params)
        for copy in (*state.memories, *state.dense):
            if copy:
                same_sharding(copy, params)
    leaf = 64 * 48
    for name, size in collectives(compiled.as_text()):
        assert size < leaf, (name, size)


def test_inside_shard_map_every_shard_is_on_its_own():
    where = mesh(AxisType.Auto)
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(64, 48)).astype(np.float32))

    def local(shard):
        return jp.mask_topk({"w": shard}, {"w": 10})["w"]

    spread = jax.shard_map(local, mesh=where, in_specs=P("x", "y"), out_specs=P("x", "y"))
    blocks = np.asarray(jax.jit(spread)(scores)).reshape(4, 16, 2, 24).swapaxes(1, 2)
    for i in range(4):
        for j in range(2):
            want = local(scores[16 * i : 16 * (i + 1), 24 * j : 24 * (j + 1)])
            np.testing.assert_array_equal(blocks[i, j], want)


def test_allocations_inside_shard_map_see_scores_that_vary():
    where = mesh(AxisType.Auto)
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(64, 48)).astype(np.float32))

    def local(shard):
        tree = {"w": jnp.abs(shard), "v": jnp.square(shard)}
        keep = jp.allocate_owl(tree, 0.5)
        return jp.mask_topk(tree, keep)["w"]

    spread = jax.shard_map(local, mesh=where, in_specs=P("x", "y"), out_specs=P("x", "y"))
    assert jax.jit(spread)(scores).dtype == bool


@pytest.mark.parametrize(
    "mask",
    [
        lambda w, k: jp.mask_topk({"w": w}, {"w": k})["w"],
        lambda w, k: jp.mask_topk({"w": w}, {"w": k}, axis=(0, 1))["w"],
        lambda w, k: jp.mask_topk({"w": w}, jp.allocate_global({"w": w}, 1 - k / w.size))["w"],
        lambda w, k: jp.mask_blocks({"w": w}, {"w": k}, block=(1, 2))["w"],
    ],
    ids=["leaves", "slices", "global", "blocks"],
)
def test_counts_vary_inside_shard_map_where_scores_do_not(mask):
    where = mesh(AxisType.Auto)
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32))
    keep = jnp.array([0, 12, 30, 48])

    def local(w, k):
        return mask(w, k[0])[None]

    spread = jax.shard_map(local, mesh=where, in_specs=(P(), P("x")), out_specs=P("x"))
    want = [mask(scores, k) for k in keep]
    np.testing.assert_array_equal(jax.jit(spread)(scores, keep), want)
