"""Phases of sparse and of dense training in turn."""

import jax
import jax.numpy as jnp
import optax

from jaxprune import _checks
from jaxprune._leaves import any_nan
from jaxprune._tree import kernels
from jaxprune._typing import Allocation, Masking, Masks, Prunable, Saliency
from jaxprune.allocation import allocate_global
from jaxprune.masks import allocate_and_mask, mask_topk, unless
from jaxprune.saliency.weights import magnitude
from jaxprune.transforms._driver import key_at, masked_training, starting_masks


def ac_dc(
    inner: optax.GradientTransformation,
    sparsity: float,
    *,
    begin: int,
    period: int,
    end: int,
    saliency: Saliency = magnitude,
    allocate: Allocation = allocate_global,
    mask: Masking = mask_topk,
    prunable: Prunable = kernels,
    masks: Masks | None = None,
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Alternating compressed and decompressed training.

    Dense for ``begin`` updates; from then on phases of ``period`` updates, compressed and dense in
    turn; compressed for good from ``end``. A compressed phase begins with

    .. math:: m \leftarrow \operatorname{mask}(s, \operatorname{allocate}(s, S))

    over all weights, and a dense phase with :math:`m \leftarrow 1`: weights that return start at
    zero, with the optimizer state of a fresh start.

    Steps, exact zeros and NaN are as in ``jp.prune_gradually``.

    Args:
      inner: an optax optimizer whose state can be matched to single weights.
      sparsity: fraction of all governed weights removed in compressed phases.
      begin: updates of dense training before the first compressed phase.
      period: updates of a phase.
      end: the update from which on it stays compressed.
      saliency: ``(params, grads, key=) -> scores``.
      allocate: ``(scores, sparsity) -> counts``.
      mask: ``(scores, counts) -> masks``.
      prunable: ``(path, leaf) -> bool``, which leaves are governed.
      masks: masks to start from; all kept by default.
      key: for random criteria.

    Returns:
      A transform whose state has ``masks``.

    Raises:
      ValueError: for a sparsity outside [0, 1] or steps out of order; from ``init``, if the inner
        state cannot be matched to weights; else as ``jp.prune_gradually``.

    Example:
      >>> import optax, jaxprune as jp
      >>> tx = jp.ac_dc(optax.sgd(0.1, momentum=0.9), 0.9, begin=100, period=50, end=800)

    Reference:
      Peste, Iofinova, Vladu, Alistarh. AC/DC: Alternating Compressed/DeCompressed Training of Deep
      Neural Networks, 2021.
    """
    _checks.check_sparsity(sparsity)
    _checks.check_steps(allocate=allocate, mask=mask, prunable=prunable)
    _checks.check_key(key, optional=True)
    if period < 1 or not 0 <= begin <= end:
        raise ValueError(
            f"begin {begin}, period {period}, end {end}: phases need 0 <= begin <= end, period >= 1"
        )

    def compressed(step):
        return (step >= begin) & ((((step - begin) // period) % 2 == 0) | (step >= end))

    def when(step):
        turns = (step >= begin) & (step < end) & ((step - begin) % period == 0)
        return turns | (step == end)

    def propose(old, step, scores):
        def squeeze():
            # Compressed for good: what the phase that ends here has trained is kept.
            fresh = allocate_and_mask(scores, sparsity, allocate, mask)
            running = (step == end) & (step > begin) & compressed(step - 1)
            return jax.tree.map(lambda o, f: jnp.where(running, o, f), old, fresh)

        def release():
            return jax.tree.map(jnp.ones_like, old)

        now = jnp.asarray(compressed(step))
        new = jax.lax.cond(now, squeeze, release)
        wanted = jnp.where(now, jnp.asarray(sparsity, jnp.float32), 0.0)
        bad = now & any_nan(scores)
        return unless(bad, new, old), wanted, bad

    return masked_training(
        inner,
        propose,
        start=lambda params: (starting_masks(params, prunable, masks), 0.0),
        when=when,
        criteria={"saliency": saliency},
        keys=lambda step: (key_at(key, step),),
        target=lambda step: sparsity,
        regrows=True,
    )
