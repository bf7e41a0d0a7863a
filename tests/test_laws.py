"""Every law of the library, over every method it applies to."""

from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import (
    ALLOCATIONS,
    LATENT,
    METHODS,
    REGROWING,
    SIZE,
    USUAL,
    dead_are_zero,
    loss,
    params,
    run,
    total,
    trained,
)

import jaxprune as jp

DTYPE_PROMOTION = "standard"  # optax's bias correction promotes


@cache
def donating(method):
    """The method's update, compiled so that it consumes the state."""
    return jax.jit(trained(method)[0].update, donate_argnums=1)


@pytest.mark.parametrize(
    ("method", "dtype"),
    [(m, jnp.bfloat16) for m in METHODS]
    + [(m, jnp.float16) for m in ("prune_global_taylor", "rigl", "sr_ste")],
)
def test_dtypes_are_preserved_and_zeros_exact(method, dtype):
    with jax.numpy_dtype_promotion("strict"):
        p, state, _ = run(METHODS[method](optax.sgd(0.01, momentum=0.9), 0.7), params(dtype), 10)
    chex.assert_trees_all_equal_dtypes(p, params(dtype))
    dead_are_zero(p, jp.get_masks(state, p))


@pytest.mark.usual(*USUAL)
@pytest.mark.parametrize("method", METHODS)
def test_jit_equals_eager(method):
    tx, _, path = trained(method)
    p = params()
    state = tx.init(p)
    for t in range(3):
        updates, state = tx.update(jax.grad(loss)(p, jnp.float32(t)), state, p)
        p = optax.apply_updates(p, updates)
        chex.assert_trees_all_equal(jp.get_masks(state, p), jp.get_masks(path[t][1], p))


@pytest.mark.usual(*USUAL)
@pytest.mark.parametrize("method", METHODS)
def test_scan_equals_loop(method):
    tx, _, path = trained(method)

    def body(carry, t):
        p, state = carry
        updates, state = tx.update(jax.grad(loss)(p, t), state, p)
        return (optax.apply_updates(p, updates), state), jp.density(jp.get_masks(state, p))

    times = jnp.arange(12, dtype=jnp.float32)
    start = params()
    (_, scanned), densities = jax.jit(lambda p: jax.lax.scan(body, (p, tx.init(p)), times))(start)
    chex.assert_trees_all_equal(*(jp.get_masks(s, start) for s in (path[-1][1], scanned)))
    assert densities.shape == (12,)


@pytest.mark.usual(*USUAL)
@pytest.mark.parametrize("method", METHODS)
def test_vmap_over_seeds(method):
    tx, step, _ = trained(method)
    many = jax.vmap(lambda seed: jax.tree.map(lambda p: p * seed, params()))(
        jnp.float32([1.0, 2.0])
    )
    together = jax.jit(jax.vmap(step, in_axes=(0, 0, None)))
    both, states = many, jax.vmap(tx.init)(many)
    for t in range(5):
        both, states = together(both, states, jnp.float32(t))
    for i in range(2):
        mine = jax.tree.map(lambda p, i=i: p[i], many)
        one, state, _ = run(tx, mine, 5, step=step)
        mask = jp.get_masks(jax.tree.map(lambda s, i=i: s[i], states), one)
        chex.assert_trees_all_equal(mask, jp.get_masks(state, one))
        chex.assert_trees_all_close(jax.tree.map(lambda p, i=i: p[i], both), one, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_one_compilation_and_a_state_that_maps_donates_and_is_abstract(method):
    tx, step, path = trained(method)
    assert step._cache_size() == 1
    p, state = path[-1]
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(tx.init, p), state)
    same = optax.tree.map_params(tx, lambda leaf: leaf, state, is_leaf=lambda v: v is None)
    chex.assert_trees_all_equal(same, state)
    update = donating(method)
    update(p, update(p, jax.tree.map(jnp.copy, tx.init(p)), p)[1], p)


@pytest.mark.parametrize("method", METHODS)
def test_interrupted_equals_uninterrupted(method):
    _, step, path = trained(method)
    p, state = jax.tree.map(jnp.asarray, jax.tree.map(np.asarray, path[4]))
    for t in range(5, 12):
        p, state = step(p, state, jnp.float32(t))
    chex.assert_trees_all_equal((p, state), path[-1])


@pytest.mark.parametrize("method", METHODS)
def test_extra_arguments_reach_the_inner_optimizer(method):
    seen = []

    def update(updates, state, params=None, *, value=None, **extra):
        seen.append(value)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
    tx, p = METHODS[method](inner, 0.5), params()
    tx.update(p, tx.init(p), p, value=3)
    assert seen == [3]


@pytest.mark.parametrize("method", [m for m in METHODS if m != "prune_random_packed"])
def test_nan_keeps_the_masks_and_is_tried_again(method):
    """Random scores know no NaN; all others meet one at step 4, where a trigger fires."""
    _, _, path = trained(method)
    p, state = path[3]
    grads = jax.grad(loss)(p, jnp.float32(0))
    poisoned, bad = jax.tree.map(lambda w: w * jnp.nan, (p, grads))
    update = donating(method)
    _, after = update(bad, jax.tree.map(jnp.copy, state), poisoned)
    chex.assert_trees_all_equal(jp.get_masks(after, p), jp.get_masks(state, p))
    assert bool(after.pending)
    healthy = jax.tree.map(jnp.copy, (state.inner_state, state.dense))
    _, again = update(grads, after._replace(inner_state=healthy[0], dense=healthy[1]), p)
    assert not bool(again.pending)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in (*REGROWING, *LATENT)])
def test_pruned_stays_pruned(method):
    _, _, path = trained(method)
    before = None
    for p, state in path:
        masks = jp.get_masks(state, p)
        if before is not None:
            assert all(
                not np.any(np.asarray(new) & ~np.asarray(old))
                for new, old in zip(jax.tree.leaves(masks), jax.tree.leaves(before), strict=True)
            )
        before = masks


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_masks_are_nested_exact_and_scale_free(allocation):
    allocate, scores = ALLOCATIONS[allocation], jp.magnitude(jp.select(params()))
    masks = jax.jit(lambda s, scores: jp.mask_topk(scores, allocate(scores, s, min_keep=0)))
    larger = None
    for sparsity in (0.0, 0.1, 0.31, 0.5, 0.7, 0.9, 0.99, 1.0):
        found = masks(sparsity, scores)
        want = SIZE - int(np.floor(np.float64(np.float32(sparsity)) * SIZE + 0.5))
        assert total(found) == want
        for power in (2.0**-20, 2.0**20):
            scaled = jax.tree.map(lambda s, power=power: s * power, scores)
            chex.assert_trees_all_equal(masks(sparsity, scaled), found)
        eager = jp.mask_topk(scores, allocate(scores, sparsity, min_keep=0))
        chex.assert_trees_all_equal(eager, found)
        if larger is not None:
            jax.tree.map(lambda a, b: np.testing.assert_array_equal(a & b, a), found, larger)
        larger = found


def test_random_growth_differs_at_every_update():
    p = {"kernel": jnp.ones((20, 20))}
    tx = jp.sparse_evolutionary(
        optax.sgd(0.0), 0.8, drop_fraction=0.5, when=jp.every(1), key=jax.random.key(0)
    )
    state, seen = tx.init(p), set()
    for _ in range(4):
        _, state = tx.update(p, state, p)
        seen.add(np.asarray(state.masks["kernel"]).tobytes())
    assert len(seen) == 4


def test_a_weight_dropped_and_grown_at_once_is_left_alone():
    """All weights are dropped, but the gradient wants the same ones: nothing changes."""
    mask = jnp.array([[True, True, False, False]])
    p = {"kernel": jnp.where(mask, 1.0, 0.0)}
    grads = {"kernel": jnp.where(mask, 9.0, 1.0)}
    tx = jp.rigl(
        optax.sgd(0.1, momentum=0.9),
        0.5,
        drop_fraction=1.0,
        when=jp.every(1),
        key=jax.random.key(0),
        masks={"kernel": mask},
    )
    state = tx.init(p)
    for _ in range(2):
        updates, state = tx.update(grads, state, p)
        p = optax.apply_updates(p, updates)
    np.testing.assert_array_equal(state.masks["kernel"], mask)
    np.testing.assert_allclose(p["kernel"][0, :2], 1 - 0.9 - 0.9 * 1.9, rtol=1e-6)


@pytest.mark.parametrize(("begin", "n", "end"), [(0, 7, 30), (3, 10, 11), (5, 100, 9), (0, 1, 0)])
def test_the_last_trigger_lands(begin, n, end):
    schedule = jp.cubic_sparsity(0.83, max(1, end - begin), begin=min(begin, end))
    tx = jp.prune_gradually(optax.sgd(0.0), schedule, when=jp.every(n, begin=begin, end=end))
    p, state, _ = run(tx, params(), end + 2)
    wanted = 0.83 if end > 0 else 0.0
    assert total(jp.get_masks(state, p)) == SIZE - round(wanted * SIZE)


def test_wrapped_in_multisteps():
    tx = optax.MultiSteps(METHODS["prune_gradually"](optax.adamw(0.01), 0.8), every_k_schedule=3)
    p, state, path = run(tx, params(), 30)
    assert total(jp.get_masks(state, p)) == SIZE - round(0.8 * SIZE)
    for p, state in path:
        dead_are_zero(p, jp.get_masks(state, p)) if int(state.gradient_step) else None


def test_keep_params_masked_survives_fine_tuning_and_donation():
    pruned, masks = jp.prune(params(), 0.9)
    tx = optax.chain(optax.adamw(0.05, weight_decay=0.1), jp.keep_params_masked(masks))
    step = jax.jit(
        lambda p, s: tx.update(jax.grad(loss)(p, jnp.float32(0)), s, p), donate_argnums=1
    )
    p, state = pruned, tx.init(pruned)
    for _ in range(20):
        updates, state = step(p, state)
        p = optax.apply_updates(p, updates)
    dead_are_zero(p, masks)
    assert total(masks) == total(jp.get_masks(state, p))


def test_masks_to_start_from():
    pruned, masks = jp.prune(params(), 0.5)
    tx = jp.prune_gradually(optax.adamw(0.01), 0.8, when=jp.every(1, begin=2), masks=masks)
    p, state, path = run(tx, pruned, 4)
    assert total(jp.get_masks(path[1][1], p)) == total(masks)
    assert total(jp.get_masks(state, p)) == SIZE - round(0.8 * SIZE)


def test_packed_equals_unpacked():
    p = params()
    make = METHODS["prune_gradually"]
    plain, packed = (run(make(optax.adamw(0.01), 0.8, packed=b), p, 10) for b in (False, True))
    chex.assert_trees_all_equal(plain[0], packed[0])
    chex.assert_trees_all_equal(jp.get_masks(plain[1], p), jp.get_masks(packed[1], p))
    assert packed[1].masks["head"]["kernel"].shape == (16, 1)
