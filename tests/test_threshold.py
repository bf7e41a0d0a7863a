"""``prune_below`` against the classic rule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp

W = jnp.float32([[0.1, 0.5, 0.2], [0.3, 0.4, 0.0], [0.0, 0.6, 0.1]])


def test_weights_at_or_below_are_gone_with_their_gradient():
    tx = jp.prune_below(optax.sgd(0.25), 0.3, when=jp.every(1), saliency=jp.magnitude)
    params = {"kernel": W}
    updates, state = tx.update({"kernel": jnp.ones((3, 3), jnp.float32)}, tx.init(params), params)
    np.testing.assert_array_equal(state.masks["kernel"], [[False, True, False]] * 3)
    new = optax.apply_updates(params, updates)["kernel"]
    np.testing.assert_allclose(new, [[0, 0.25, 0], [0, 0.15, 0], [0, 0.35, 0]], atol=1e-7)


def test_what_is_gone_stays_gone_and_the_best_survives():
    tx = jp.prune_below(optax.sgd(0.25), 0.3, when=jp.every(1), saliency=jp.magnitude)
    params = {"kernel": W}
    state = tx.init(params)
    for _ in range(4):
        updates, state = tx.update({"kernel": jnp.ones((3, 3), jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
    assert np.argwhere(np.asarray(state.masks["kernel"])).tolist() == [[2, 1]]


def test_a_scheduled_threshold_on_gradients():
    schedule = optax.linear_schedule(0.0, 1.0, 4)
    tx = jp.prune_below(optax.sgd(0.0), schedule, when=jp.every(2))
    params, grads = {"kernel": W}, {"kernel": W}
    state, kept = tx.init(params), []
    for _ in range(5):
        _, state = tx.update(grads, state, params)
        kept.append(int(state.masks["kernel"].sum()))
    assert kept == [7, 7, 1, 1, 1]  # above 0, above 0.5, and the one that min_keep saves


@pytest.mark.parametrize("axes", [0, (0,), {"kernel": 0}])
def test_whole_slices_by_summed_score(axes):
    def squared_gradient(params, grads=None, *, key=None):
        del params, key
        return jax.tree.map(jnp.square, grads)

    tx = jp.prune_below(
        optax.sgd(0.0), 0.09, when=jp.every(1), saliency=squared_gradient, axes=axes
    )
    params = {"kernel": jnp.ones((3, 3), jnp.float32)}
    _, state = tx.update({"kernel": W}, tx.init(params), params)
    # Column sums of squares: 0.1, 0.77, 0.05.
    np.testing.assert_array_equal(state.masks["kernel"], [[True, True, False]] * 3)


def test_slices_that_live_are_the_best_when_all_fall_below():
    tx = jp.prune_below(
        optax.sgd(0.0), 99.0, when=jp.every(1), saliency=jp.magnitude, axes=0, min_keep=2
    )
    params = {"kernel": W}
    _, state = tx.update(params, tx.init(params), params)
    np.testing.assert_array_equal(state.masks["kernel"], [[False, True, False]] * 3)
