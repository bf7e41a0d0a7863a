"""Every method with every optimizer; ``pytest --full tests/test_optimizers.py`` for all pairs."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import (
    CONSTANT,
    EXACT,
    LATENT,
    METHODS,
    OPTIMIZERS,
    REGROWING,
    SIZE,
    dead_are_zero,
    kept,
    loss,
    params,
    run,
    total,
    trained,
)

import jaxprune as jp

DTYPE_PROMOTION = "standard"  # optax's bias correction promotes


def test_zeros_are_exact(method, optimizer):
    """After every one of 50 updates; swept over pairs by ``conftest.py``."""
    _, _, path = trained(method, optimizer, 50)
    for p, state in path[:12] + path[12::7] + path[-1:]:
        dead_are_zero(p, jp.get_masks(state, p))
    if method in EXACT:
        assert total(jp.get_masks(state, p)) == SIZE - round(np.float32(0.7) * SIZE)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(p))


def test_regrown_weights_start_afresh(regrower, optimizer):
    """Grown weights are zero and hold what ``inner.init`` gives; the count never changes."""
    method = regrower
    inner = OPTIMIZERS[optimizer]()
    _, _, path = trained(method, optimizer, 50)
    p = path[0][0]
    if method in CONSTANT:
        assert len({str(kept(jp.get_masks(s, q))) for q, s in path}) == 1
    grew = 0
    for (_, old), (after, new) in pairwise(path[:12]):
        grown = jax.tree.map(
            lambda a, b: np.asarray(b & ~a), jp.get_masks(old, p), jp.get_masks(new, p)
        )
        if not total(grown):
            continue
        grew += total(grown)
        dead_are_zero(after, jax.tree.map(np.logical_not, grown))
        fresh = inner.init(
            jax.tree.map(
                lambda w, g: w if g is None else np.where(g, 0, w),
                after,
                grown,
                is_leaf=lambda v: v is None,
            )
        )
        compare_where_grown(new.inner_state, fresh, grown, after)
    assert grew > 0


def compare_where_grown(state, fresh, grown, p):
    sizes = {
        leaf.shape: g
        for leaf, g in zip(
            jax.tree.leaves(p), jax.tree.leaves(grown, is_leaf=lambda v: v is None), strict=True
        )
        if g is not None
    }
    for now, new in zip(jax.tree.leaves(state), jax.tree.leaves(fresh), strict=True):
        where = sizes.get(now.shape)
        if where is not None and now.ndim > 1:
            np.testing.assert_array_equal(np.asarray(now)[where], np.asarray(new)[where])


@pytest.mark.parametrize("inner", [optax.sm3(0.1), optax.lbfgs()])
@pytest.mark.parametrize("method", REGROWING)
def test_unmatchable_optimizers_are_refused(method, inner):
    with pytest.raises(ValueError, match="cannot be matched"):
        METHODS[method](inner, 0.5).init(params())


@pytest.mark.parametrize("method", METHODS)
def test_lookahead_is_refused(method):
    """Its slow weights are parameters that no mask reaches."""
    inner = optax.lookahead(optax.sgd(0.1), 3, 0.5)
    for p in (params(), optax.LookaheadParams.init_synced(params())):
        with pytest.raises(ValueError, match="lookahead keeps a second"):
            METHODS[method](inner, 0.5).init(p)


@pytest.mark.parametrize("method", LATENT)
def test_schedule_free_is_refused_where_weights_are_dense(method):
    with pytest.raises(ValueError, match="schedule-free optimizers are evaluated"):
        METHODS[method](OPTIMIZERS["schedule_free"](), 0.5).init(params())


@pytest.mark.parametrize("method", ["prune_gradually", "rigl"])
def test_schedule_free_for_a_part_of_the_weights(method):
    inner = optax.partition(
        {"wide": optax.contrib.schedule_free_adamw(0.01), "rest": optax.sgd(0.05)},
        lambda p: jax.tree.map(lambda w: "wide" if w.ndim > 1 else "rest", p),
    )
    p, state, _ = run(METHODS[method](inner, 0.7), params(), 12)
    masks = jp.get_masks(state, p)
    dead_are_zero(p, masks)
    averages = state.inner_state.inner_states["wide"].inner_state.z
    for layer in ("conv", "dense", "head"):
        dead_are_zero(averages[layer]["kernel"], masks[layer]["kernel"])


def test_sm3_prunes():
    p, state, _ = run(METHODS["prune_gradually"](optax.sm3(0.05), 0.7), params(), 12)
    dead_are_zero(p, jp.get_masks(state, p))


@pytest.mark.parametrize("method", ["prune_gradually", "rigl", "ac_dc"])
def test_schedule_free_is_zero_where_it_is_evaluated(method):
    _, _, path = trained(method, "schedule_free", 50 if method != "ac_dc" else 12)
    for p, state in path:
        evaluated = optax.contrib.schedule_free_eval_params(state.inner_state, p)
        settled = jp.get_masks(state, p)
        grown = jax.tree.map(lambda w, m: m & (w == 0), governed(p, settled), settled)
        dead_are_zero(evaluated, jax.tree.map(lambda m, g: m & ~g, settled, grown))


def governed(p, masks):
    return jax.tree.map(
        lambda w, m: None if m is None else w, p, masks, is_leaf=lambda v: v is None
    )


def test_around_the_wrapper():
    """Wrappers that pass updates on, or zero them, may surround ours."""
    inner = METHODS["prune_gradually"](optax.adamw(0.01), 0.8)
    tx = optax.apply_if_finite(inner, max_consecutive_errors=5)
    p, state = params(), tx.init(params())
    step = jax.jit(lambda g, s, p: tx.update(g, s, p))
    for t in range(12):
        grads = jax.grad(loss)(p, jnp.float32(t))
        if t == 5:
            grads = jax.tree.map(lambda g: g * jnp.nan, grads)
        updates, state = step(grads, state, p)
        p = optax.apply_updates(p, updates)
        dead_are_zero(p, jp.get_masks(state, p))
    assert total(jp.get_masks(state, p)) == SIZE - round(0.8 * SIZE)
