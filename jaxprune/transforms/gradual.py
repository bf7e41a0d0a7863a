"""Gradual pruning, and one-shot pruning in the middle of training."""

import jax
import jax.numpy as jnp
import optax

from jaxprune import _checks
from jaxprune._tree import kernels
from jaxprune._typing import Allocation, Masking, Masks, Prunable, Saliency, Trigger
from jaxprune.allocation import allocate_uniform
from jaxprune.masks import mask_topk, shrink_masks
from jaxprune.saliency.weights import magnitude
from jaxprune.transforms._driver import shrinking


def prune_gradually(
    inner: optax.GradientTransformation,
    sparsity: float | optax.Schedule,
    *,
    when: Trigger,
    saliency: Saliency = magnitude,
    allocate: Allocation = allocate_uniform,
    mask: Masking = mask_topk,
    prunable: Prunable = kernels,
    masks: Masks | None = None,
    key: jax.Array | None = None,
    packed: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Wrap an optimizer so that it prunes while it trains.

    At every update t at which ``when`` fires,

    .. math:: m \leftarrow m \odot \operatorname{mask}(s, \operatorname{allocate}(s, S(t)))

    and at every update the inner optimizer sees :math:`m \odot g`, and what comes out is
    :math:`-w` where pruned: after ``optax.apply_updates`` pruned weights are exactly zero, whatever
    momentum or weight decay wanted. A trigger that fires once prunes in one shot.

    A step is one call of ``update``, the first is step 0. Inside ``optax.MultiSteps`` that is one
    accumulated update; around it, every micro-step. The masks act from the update that computes
    them, so the very first gradient is dense unless the parameters were masked before. This wrapper
    is the outermost transform; only wrappers that pass updates on or zero them (``MultiSteps``,
    ``apply_if_finite``) may surround it.

    Args:
      inner: any optax optimizer.
      sparsity: fraction of all governed weights removed, a number or an ``optax.Schedule``.
      when: the updates at which masks are recomputed, such as ``jp.every(100, end=10_000)``.
      saliency: ``(params, grads, key=) -> scores``; it sees the dense gradient.
      allocate: ``(scores, sparsity) -> counts``.
      mask: ``(scores, counts) -> masks``.
      prunable: ``(path, leaf) -> bool``, which leaves are governed.
      masks: masks to start from; all kept by default.
      key: for random criteria; each update gets ``fold_in(key, step)``.
      packed: store the masks one bit a weight.

    Returns:
      A transform whose state has ``masks``. A mask update that meets NaN scores keeps the old masks
      and is tried again at the next step.

    Raises:
      ValueError: for a number outside [0, 1] or a schedule that ends at NaN or in percent; from
        ``init``, if nothing is prunable or the given masks do not fit; from ``update``, without
        params.
      TypeError: for a step of the pipeline that takes other arguments, or a key that is none.

    Example:
      >>> import jax.numpy as jnp, optax, jaxprune as jp
      >>> sparsity = jp.cubic_sparsity(0.5, 4)
      >>> tx = jp.prune_gradually(optax.sgd(0.1), sparsity, when=jp.every(2, end=4))

    Reference:
      Zhu, Gupta. To prune, or not to prune: exploring the efficacy of pruning for model
      compression, 2017.
    """
    schedule = _checks.as_fraction(sparsity, "sparsity")
    _checks.check_steps(allocate=allocate, mask=mask)

    def propose(old, step, scores):
        wanted = jnp.clip(jnp.asarray(schedule(step), jnp.float32), 0.0, 1.0)
        new, bad = shrink_masks(old, scores, wanted, allocate, mask)
        return new, wanted, bad

    return shrinking(
        inner,
        propose,
        when=when,
        saliency=saliency,
        prunable=prunable,
        target=schedule,
        masks=masks,
        key=key,
        packed=packed,
    )
