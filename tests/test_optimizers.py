"""Every optimizer under a method that only prunes and methods that regrow."""

from itertools import pairwise

import jax
import numpy as np
import optax
import pytest
from cases import METHODS, OPTIMIZERS, REGROWING, SIZE, dead_are_zero, kept, params, total, trained

import jaxprune as jp

DTYPE_PROMOTION = "standard"  # optax's bias correction promotes


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", ["prune_gradually", "rigl"])
def test_zeros_are_exact_for_every_optimizer(method, optimizer):
    _, _, path = trained(method, optimizer, 50)
    for p, state in path[::7] + path[-1:]:
        dead_are_zero(p, jp.get_masks(state, p))
    assert total(jp.get_masks(state, p)) == SIZE - round(0.7 * SIZE)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(p))


@pytest.mark.parametrize("method", REGROWING)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_regrown_weights_start_afresh(method, optimizer):
    """Grown weights are zero and hold what ``inner.init`` gives; the count never changes."""
    inner = OPTIMIZERS[optimizer]()
    _, _, path = trained(method, optimizer, 50 if method == "rigl" else 12)
    p = path[0][0]
    counts = {str(kept(jp.get_masks(s, q))) for q, s in path}
    assert len(counts) == 1
    grew = 0
    for (_, old), (after, new) in pairwise(path[:12]):
        grown = jax.tree.map(
            lambda a, b: np.asarray(b & ~a), jp.get_masks(old, p), jp.get_masks(new, p)
        )
        grew += total(grown)
        dead_are_zero(after, jax.tree.map(np.logical_not, grown))
        if not total(grown):
            continue
        fresh = inner.init(
            jax.tree.map(
                lambda w, g: w if g is None else np.where(g, 0, w),
                after,
                grown,
                is_leaf=lambda v: v is None,
            )
        )
        compare_where_grown(inner, new.inner_state, fresh, grown, after)
    assert grew > 0


def compare_where_grown(inner, state, fresh, grown, p):
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
