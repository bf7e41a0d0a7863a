"""Drop and grow: the number of weights stays, their places move."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprune import _checks, _exact, _tree
from jaxprune._leaves import any_nan
from jaxprune._tree import kernels
from jaxprune._typing import (
    Allocation,
    Counts,
    Masking,
    Masks,
    Prunable,
    Saliency,
    Scores,
    Trigger,
)
from jaxprune.allocation import allocate_erk
from jaxprune.masks import bury, mask_topk, unless
from jaxprune.saliency.weights import random_saliency
from jaxprune.transforms._driver import masked_training, starting_masks


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
      ValueError: for numbers outside [0, 1] or a ``drop_fraction`` that starts at NaN or in
        percent; from ``init``, if nothing is prunable, the masks do not fit, or the inner state
        cannot be matched to weights (SM3, L-BFGS); from ``update``, without params.
      TypeError: as ``jp.prune_gradually``.

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
    fraction = _checks.as_fraction(drop_fraction, "drop_fraction", at=0)
    _checks.check_steps(allocate=allocate, mask=mask, prunable=prunable)
    _checks.check_key(key)

    def start(params):
        if masks is not None:
            return starting_masks(params, prunable, masks), sparsity
        scores = random_saliency(_tree.select(params, prunable), key=jax.random.fold_in(key, 0))
        return mask(scores, allocate(scores, sparsity)), sparsity

    def propose(old, step, drops, grows):
        kept = jax.tree.map(lambda m: jnp.sum(m, dtype=jnp.int32), old)
        new, bad = exchange(old, drops, grows, kept, fraction(step), mask)
        return new, sparsity, bad

    return masked_training(
        inner,
        propose,
        start=start,
        when=when,
        criteria={"drop": drop, "grow": grow},
        keys=lambda step: jax.random.split(jax.random.fold_in(key, step + 1)),
        target=lambda step: sparsity,
        regrows=True,
    )


def exchange(
    old: Masks, drops: Scores, grows: Scores, keep: Counts, rate: Any, mask: Masking
) -> tuple[Masks, jax.Array]:
    """Masks of ``keep`` weights, a share ``rate`` of them chosen by ``grows``; old ones if NaN."""
    drops = bury(old, drops)
    bad = any_nan(drops) | any_nan(grows)
    rate = jnp.clip(jnp.asarray(rate, jnp.float32), 0.0, 1.0)
    alive = jax.tree.map(lambda m: jnp.sum(m, dtype=jnp.int32), old)
    stay = jax.tree.map(lambda k, n: jnp.minimum(k - _share(rate, k), n), keep, alive)
    survivors = mask(drops, stay)
    return unless(bad, mask(_tree.map_governed(_first, survivors, grows), keep), old), bad


def _first(mask: jax.Array, score: jax.Array) -> jax.Array:
    """Scores in which survivors come first."""
    infinite = jnp.asarray(jnp.inf, score.dtype)
    largest = jnp.asarray(jnp.finfo(score.dtype).max, score.dtype)
    # Selected, since a minimum would flush subnormals.
    return jnp.where(mask, infinite, jnp.where(score == infinite, largest, score))


def _share(rate: jax.Array, kept: jax.Array) -> jax.Array:
    number = _exact.from_uint32(kept.astype(jnp.uint32))
    return _exact.round_product(rate, number).low.astype(jnp.int32)
