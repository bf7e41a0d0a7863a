"""Train all weights through the masks that hide most of them."""

import jax
import jax.numpy as jnp
import optax

from jaxprune._tree import kernels
from jaxprune._typing import Allocation, Masking, Masks, Prunable, Saliency, Trigger
from jaxprune.allocation import allocate_erk
from jaxprune.masks import mask_topk
from jaxprune.saliency.weights import magnitude
from jaxprune.transforms._latent import latent_training


def train_straight_through(
    inner: optax.GradientTransformation,
    sparsity: float | optax.Schedule,
    *,
    when: Trigger,
    saliency: Saliency = magnitude,
    allocate: Allocation = allocate_erk,
    mask: Masking = mask_topk,
    prunable: Prunable = kernels,
    masks: Masks | None = None,
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Masked weights in the model, dense ones in the state, and a gradient that reaches all.

    .. math:: \theta \leftarrow \theta + \operatorname{inner}(g, \theta), \quad
              m \leftarrow \operatorname{mask}(s(\theta)), \quad w = m \odot \theta

    where g is the gradient at the model's weights w. The parameters that a training loop holds are
    w; the inner optimizer sees :math:`\theta`. Pruned weights go on learning and may come back with
    what they have learned.

    Steps and exact zeros are as in ``jp.prune_gradually``. A mask update that meets NaN keeps the
    old masks and is tried again at the next step.

    Args:
      inner: any optax optimizer.
      sparsity: fraction of all governed weights hidden, a number or an ``optax.Schedule``.
      when: the updates at which masks are recomputed; ``jp.every(1)`` in the papers.
      saliency: ``(params, grads, key=) -> scores``, of the dense weights.
      allocate: ``(scores, sparsity) -> counts``.
      mask: ``(scores, counts) -> masks``.
      prunable: ``(path, leaf) -> bool``, which leaves are governed.
      masks: masks to start from; all kept by default.
      key: for random criteria.

    Returns:
      A transform whose state has ``masks``, and the dense weights in ``dense[0]``.

    Raises:
      ValueError: as ``jp.prune_gradually``.

    Example:
      >>> import optax, jaxprune as jp
      >>> tx = jp.train_straight_through(optax.adam(1e-3), 0.9, when=jp.every(1))

    Reference:
      Bengio, Leonard, Courville. Estimating or Propagating Gradients Through Stochastic Neurons for
      Conditional Computation, 2013.
    """
    return latent_training(
        inner,
        sparsity,
        lambda g, w, m, reach: g,
        when=when,
        saliency=saliency,
        allocate=allocate,
        mask=mask,
        prunable=prunable,
        masks=masks,
        key=key,
    )


def sr_ste(
    inner: optax.GradientTransformation,
    sparsity: float | optax.Schedule,
    *,
    when: Trigger,
    decay: float = 2e-4,
    saliency: Saliency = magnitude,
    allocate: Allocation = allocate_erk,
    mask: Masking = mask_topk,
    prunable: Prunable = kernels,
    masks: Masks | None = None,
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Straight-through training whose hidden weights decay, so that masks settle.

    .. math:: g \leftarrow g + \lambda \, (1 - m) \odot \theta

    and then as ``jp.train_straight_through``.

    Args:
      inner: any optax optimizer.
      sparsity: fraction of all governed weights hidden, a number or an ``optax.Schedule``.
      when: the updates at which masks are recomputed.
      decay: :math:`\lambda`, at least 0.
      saliency: ``(params, grads, key=) -> scores``, of the dense weights.
      allocate: ``(scores, sparsity) -> counts``.
      mask: ``(scores, counts) -> masks``. The paper's N:M is ``jp.gradual_n_m(n, m, axis=...)``
        with ``allocate=jp.allocate_uniform``: other allocations give leaves more or less than n:m.
      prunable: ``(path, leaf) -> bool``, which leaves are governed.
      masks: masks to start from; all kept by default.
      key: for random criteria.

    Returns:
      A transform whose state has ``masks``, and the dense weights in ``dense[0]``.

    Raises:
      ValueError: for a negative decay; else as ``jp.prune_gradually``.

    Example:
      >>> import optax, jaxprune as jp
      >>> tx = jp.sr_ste(optax.sgd(0.1), 0.5, when=jp.every(1))

    Reference:
      Zhou et al. Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch, 2021.
    """
    if not decay >= 0:
        raise ValueError(f"decay is {decay}; it is at least 0")

    def decayed(g, w, m, reach):
        del reach
        return g + jnp.where(m, jnp.zeros((), g.dtype), (w * decay).astype(g.dtype))

    return latent_training(
        inner,
        sparsity,
        decayed,
        when=when,
        saliency=saliency,
        allocate=allocate,
        mask=mask,
        prunable=prunable,
        masks=masks,
        key=key,
    )
