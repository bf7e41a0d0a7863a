"""Dense weights in the state, masked ones in the model."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprune import _checks, _tree
from jaxprune._leaves import any_nan
from jaxprune._typing import Allocation, Masking, Masks, Prunable, PyTree, Saliency, Trigger
from jaxprune.masks import allocate_and_mask, unless
from jaxprune.saliency.accumulate import check_criterion, memory_of, score
from jaxprune.transforms._driver import (
    PruningState,
    check_state,
    check_update,
    common_type,
    key_at,
    starting_masks,
)
from jaxprune.transforms._moments import check_composes

Adjust = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
"""``adjust(gradient, dense weight, mask, reach) -> gradient`` that the inner optimizer sees."""


def latent_training(
    inner: optax.GradientTransformation,
    sparsity: float | optax.Schedule,
    adjust: Adjust,
    *,
    when: Trigger,
    saliency: Saliency,
    allocate: Allocation,
    mask: Masking,
    prunable: Prunable,
    masks: Masks | None,
    key: jax.Array | None,
    backward_sparsity: float | optax.Schedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Train dense weights while the model sees ``mask * dense``.

    The state's ``dense`` holds the dense weights and their ``reach``: the weights that are trained,
    all of them unless there is a ``backward_sparsity``.
    """
    _checks.check_steps(when=when, allocate=allocate, mask=mask, prunable=prunable)
    check_criterion(saliency)
    _checks.check_key(key, optional=True)
    _checks.check_optimizer(inner)
    inner = optax.with_extra_args_support(inner)
    schedule = _checks.as_fraction(sparsity, "sparsity")
    goal = _checks.Target(schedule)
    backward = None
    if backward_sparsity is not None:
        backward = _checks.as_fraction(backward_sparsity, "backward_sparsity")

    def init(params):
        start = starting_masks(params, prunable, masks)
        check_composes(inner, params, latent=True)
        governed = _tree.map_governed(lambda _, p: jnp.array(p, copy=True), start, params)
        reach = () if backward is None else starting_masks(params, prunable)
        return PruningState(
            step=jnp.zeros((), jnp.int32),
            masks=start,
            sparsity=jnp.zeros((), jnp.float32),
            target=goal.start(),
            pending=jnp.zeros((), bool),
            memories=(memory_of(saliency, governed),),
            dense=(governed, reach),
            inner_state=inner.init(params),
        )

    @jax.jit  # compiled once even where update is called eagerly
    def decide(before, pending, step, memory, dense, grads):
        ask, memory = score(saliency, dense, grads, memory, key_at(key, step))

        def recompute():
            scores = ask()
            wanted = _fraction(schedule, step)
            found = allocate_and_mask(scores, wanted, allocate, mask)
            reach: Any = ()
            if backward is not None:
                wider = jnp.minimum(_fraction(backward, step), wanted)
                reach = allocate_and_mask(scores, wider, allocate, mask)
                reach = jax.tree.map(jnp.logical_or, reach, found)
            bad = any_nan(scores)
            return *unless(bad, (found, reach, wanted), before), bad

        due = jnp.asarray(when(step)) | pending
        same = (*before, jnp.zeros_like(pending))
        return jax.lax.cond(due, recompute, lambda: same), memory

    def update(updates, state, params=None, **extra):
        check_update(updates, params)
        check_state(state, 1, 2)
        goal.check(state.target)
        _tree.check_like("the state's masks", state.masks, params)
        dense, reach = state.dense
        everything = _put(dense, params)
        trained = reach if backward is not None else jax.tree.map(jnp.ones_like, state.masks)
        grads = _tree.map_governed(lambda d, g: g, dense, updates)
        seen = _tree.map_governed(adjust, grads, dense, state.masks, trained)
        moves, inner_state = inner.update(
            _put(seen, updates), state.inner_state, everything, **extra
        )
        moved = optax.apply_updates(everything, moves)
        new = _tree.map_governed(lambda d, w, r: jnp.where(r, w, d), dense, moved, trained)
        before = (state.masks, reach, state.sparsity)
        found, memory = decide(before, state.pending, state.step, state.memories[0], new, grads)
        current, reach, sparsity, pending = found
        shown, new = _show(moves, params, new, current)
        return shown, PruningState(
            step=optax.safe_increment(state.step),
            masks=current,
            sparsity=sparsity,
            target=state.target,
            pending=pending,
            memories=(memory,),
            dense=(new, reach),
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _fraction(schedule, step) -> jax.Array:
    return jnp.clip(jnp.asarray(schedule(step), jnp.float32), 0.0, 1.0)


def _put(governed: PyTree, tree: PyTree) -> PyTree:
    """``tree`` with its governed leaves replaced."""
    return jax.tree.map(
        lambda mine, theirs: theirs if mine is None else mine,
        governed,
        tree,
        is_leaf=_tree.is_none,
    )


def _show(moves: PyTree, params: PyTree, new: PyTree, masks: Masks) -> tuple[PyTree, PyTree]:
    """Updates that leave ``masks * dense`` in the model, and the dense weights.

    ``p + (w - p)`` need not be w: a visible dense weight is what that sum really is, within half an
    ulp of p. The difference is no product, which a compiler could fuse with the sum into another
    value, and is rounded here, since it may be kept wider than its type.
    """

    def emit(u, p, w, m):
        if w is None or u is None or p is None:
            return u
        dtype = common_type(u, p)
        return jnp.where(m, _rounded(w.astype(dtype) - p.astype(dtype)), -p.astype(dtype))

    def land(p, w, e, m):
        seen = _rounded((p.astype(e.dtype) + e).astype(p.dtype))
        return jnp.where(m, seen, w)

    emitted = jax.tree.map(emit, moves, params, new, masks, is_leaf=_tree.is_none)
    shown = _tree.map_governed(lambda w, e: e, new, emitted)
    visible = _tree.map_governed(lambda w, p: p, new, params)
    return emitted, _tree.map_governed(land, visible, new, shown, masks)


def _rounded(x: jax.Array) -> jax.Array:
    info = jnp.finfo(x.dtype)
    return jax.lax.reduce_precision(x, info.nexp, info.nmant)
