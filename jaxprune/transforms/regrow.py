"""Drop and grow: the number of weights stays, their places move."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune import _checks, _exact, _tree
from jaxprune._tree import kernels
from jaxprune._typing import Allocation, Masking, Masks, Params, Prunable, Saliency, Trigger
from jaxprune.allocation import allocate_erk
from jaxprune.masks import mask_topk
from jaxprune.saliency.weights import random_saliency
from jaxprune.transforms._driver import (
    PruningState,
    any_nan,
    check_update,
    masked_gradients,
    new_state,
    starting_masks,
    zeroing_updates,
)
from jaxprune.transforms._moments import check_restartable, restart


def prune_and_grow(
    inner: optax.GradientTransformation,
    sparsity: float,
    *,
    drop: Saliency,
    grow: Saliency,
    drop_fraction: float | optax.Schedule,
    when: Trigger,
    key: jax.Array,
    allocate: Allocation = allocate_erk,
    mask: Masking = mask_topk,
    prunable: Prunable = kernels,
    masks: Masks | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Wrap an optimizer so that it trains a sparse network whose connections move.

    At every update t at which ``when`` fires, in each leaf with k weights, the
    :math:`\lfloor f(t) k + 1/2 \rfloor` that score lowest under ``drop`` go, and as many of all
    others that score highest under ``grow`` come. A weight that goes and comes back at once stays
    as it is. Grown weights are zero after the update, and their optimizer state is what
    ``inner.init`` gives them. The number of kept weights never changes.

    Steps and exact zeros are as in ``jp.prune_gradually``: the first update masks the parameters.

    Args:
      inner: an optax optimizer whose state can be matched to single weights.
      sparsity: fraction of all governed weights that are zero throughout, in [0, 1].
      drop: ``(params, grads, key=) -> scores`` that rank the kept weights.
      grow: ``(params, grads, key=) -> scores`` that rank the others; it sees the dense gradient.
      drop_fraction: fraction of a leaf's kept weights that move, a number or an ``optax.Schedule``.
      when: the updates at which they move.
      key: a PRNG key for the first masks and random criteria.
      allocate: ``(scores, sparsity) -> counts``, used once.
      mask: ``(scores, counts) -> masks``.
      prunable: ``(path, leaf) -> bool``, which leaves are governed.
      masks: masks to start from; random ones at ``sparsity`` by default.

    Returns:
      A transform whose state has ``masks``. A mask update that meets NaN scores keeps the old masks
      and is tried again at the next step.

    Raises:
      ValueError: for numbers outside [0, 1]; from ``init``, if nothing is prunable, the masks do
        not fit, or the inner state cannot be matched to weights (SM3, L-BFGS); from ``update``,
        without params.

    Example:
      >>> import jax, optax, jaxprune as jp
      >>> tx = jp.prune_and_grow(optax.sgd(0.1), 0.9, drop=jp.magnitude, grow=jp.random_saliency,
      ...                        drop_fraction=0.3, when=jp.every(100), key=jax.random.key(0))

    Reference:
      Mocanu et al. Scalable training of artificial neural networks with adaptive sparse
      connectivity inspired by network science, 2018; Evci, Gale, Menick, Castro, Elsen. Rigging the
      Lottery: Making All Tickets Winners, 2020.
    """
    _checks.check_sparsity(sparsity)
    fraction = _checks.as_schedule(drop_fraction, "drop_fraction", _checks.check_sparsity)
    inner = optax.with_extra_args_support(inner)

    def init(params: Params) -> PruningState:
        start = starting_masks(params, prunable, masks)
        if jax.tree.leaves(start):
            check_restartable(inner, params)
        if masks is None:
            governed = _tree.map_governed(lambda _, p: p, start, params)
            scores = random_saliency(governed, key=jax.random.fold_in(key, 0))
            start = mask(scores, allocate(scores, sparsity))
        return new_state(start, inner.init(params), sparsity)

    def move(old, step, governed, dense):
        """New masks, and whether a score was NaN."""
        step_keys = jax.random.split(jax.random.fold_in(key, step + 1))
        drops = drop(governed, dense, key=step_keys[0])
        grows = grow(governed, dense, key=step_keys[1])
        drops = _tree.map_governed(lambda m, s: jnp.where(m, s, _inf(s, -1)), old, drops)
        bad = any_nan(drops) | any_nan(grows)
        kept = jax.tree.map(lambda m: jnp.sum(m, dtype=jnp.int32), old)
        rate = jnp.clip(jnp.asarray(fraction(step), jnp.float32), 0.0, 1.0)
        stay = jax.tree.map(lambda k: k - _share(rate, k), kept)
        survivors = mask(drops, stay)
        grows = _tree.map_governed(lambda m, s: jnp.where(m, _inf(s, 1), s), survivors, grows)
        return jax.tree.map(lambda m, n: jnp.where(bad, m, n), old, mask(grows, kept)), bad

    @jax.jit  # compiled once even where update is called eagerly
    def decide(old, step, pending, governed, dense):
        due = jnp.asarray(when(step)) | pending
        moved = jax.lax.cond(
            due,
            lambda: move(old, step, governed, dense),
            lambda: (old, jnp.zeros_like(pending)),
        )
        return *moved, due

    @jax.jit
    def refresh(due, inner_state, params, grown):
        return jax.lax.cond(
            due, lambda: restart(inner, inner_state, params, grown), lambda: inner_state
        )

    def update(updates, state, params=None, **extra):
        check_update(updates, params)
        governed = _tree.map_governed(lambda _, p: p, state.masks, params)
        dense = _tree.map_governed(lambda _, g: g, state.masks, updates)
        current, pending, due = decide(state.masks, state.step, state.pending, governed, dense)
        grown = jax.tree.map(lambda new, old: new & ~old, current, state.masks)
        settled = jax.tree.map(jnp.logical_and, current, state.masks)
        updates, inner_state = inner.update(
            masked_gradients(updates, settled), state.inner_state, params, **extra
        )
        # Grown weights start at zero: they count as pruned in the update that grows them.
        updates = zeroing_updates(updates, params, settled)
        zeroed = masked_gradients(params, settled)
        return updates, PruningState(
            step=optax.safe_increment(state.step),
            masks=current,
            sparsity=state.sparsity,
            pending=pending,
            inner_state=refresh(due, inner_state, zeroed, grown),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _share(rate: jax.Array, kept: jax.Array) -> jax.Array:
    """floor(rate * kept + 1/2), exactly."""
    number = _exact.from_uint32(kept.astype(jnp.uint32))
    return _exact.to_uint32(_exact.round_product(rate, number)).astype(jnp.int32)


def _inf(like: jax.Array, sign: int) -> jax.Array:
    return jnp.asarray(sign * np.inf, like.dtype)
