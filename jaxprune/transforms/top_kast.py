"""Sparse forward and sparse backward, over two nested sets of weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune import _checks
from jaxprune._tree import kernels
from jaxprune._typing import Allocation, Masking, Masks, Prunable, Saliency, Trigger
from jaxprune.allocation import allocate_uniform
from jaxprune.masks import mask_topk
from jaxprune.saliency.weights import magnitude
from jaxprune.transforms._latent import latent_training


def top_kast(
    inner: optax.GradientTransformation,
    sparsity: float,
    *,
    when: Trigger,
    backward_sparsity: float | None = None,
    penalty: float = 1e-4,
    saliency: Saliency = magnitude,
    allocate: Allocation = allocate_uniform,
    mask: Masking = mask_topk,
    prunable: Prunable = kernels,
    masks: Masks | None = None,
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Always sparse training: the model sees the top-K weights, the gradient the top-(K+M).

    With the forward set A of density D and the backward set :math:`B \supseteq A`,

    .. math:: w = \mathbb 1_A \odot \theta, \quad
              g \leftarrow \mathbb 1_B \odot (g + \lambda\,\theta \odot (\mathbb 1_A +
              \mathbb 1_{B \setminus A} / D))

    The exploration penalty pushes weights of A that do not earn their place out of it, and those of
    B without A harder. Weights outside B stay as they are. The dense weights live in the state.

    Steps, exact zeros and NaN are as in ``jp.train_straight_through``.

    Args:
      inner: any optax optimizer.
      sparsity: 1 - D, fraction of all governed weights outside A.
      when: the updates at which A and B are recomputed.
      backward_sparsity: fraction of all governed weights outside B; half the density more than A by
        default.
      penalty: :math:`\lambda`, at least 0.
      saliency: ``(params, grads, key=) -> scores``, of the dense weights.
      allocate: ``(scores, sparsity) -> counts``.
      mask: ``(scores, counts) -> masks``.
      prunable: ``(path, leaf) -> bool``, which leaves are governed.
      masks: masks to start from; all kept by default.
      key: for random criteria.

    Returns:
      A transform whose state has ``masks`` (A); ``dense`` holds the dense weights and B.

    Raises:
      ValueError: for numbers outside [0, 1], a negative penalty, or B smaller than A; else as
        ``jp.prune_gradually``.

    Example:
      >>> import optax, jaxprune as jp
      >>> tx = jp.top_kast(optax.adam(1e-3), 0.9, backward_sparsity=0.8, when=jp.every(1))

    Reference:
      Jayakumar, Pascanu, Rae, Osindero, Elsen. Top-KAST: Top-K Always Sparse Training, 2020.
    """
    _checks.check_sparsity(sparsity)
    if backward_sparsity is None:
        backward_sparsity = max(0.0, 1.0 - 1.5 * (1.0 - sparsity))
    _checks.check_sparsity(backward_sparsity, "backward_sparsity")
    if backward_sparsity > sparsity:
        raise ValueError(
            f"backward_sparsity is {backward_sparsity}, sparsity {sparsity}; the gradient reaches "
            "all weights that the model sees, so it cannot be larger"
        )
    if not penalty >= 0:
        raise ValueError(f"penalty is {penalty}; it is at least 0")
    density = max(float(1.0 - sparsity), float(np.finfo(np.float32).tiny))
    harder = penalty / density

    def explored(g, w, m, reach):
        strength = jnp.where(m, jnp.asarray(penalty, w.dtype), jnp.asarray(harder, w.dtype))
        return jnp.where(reach, g + (strength * w).astype(g.dtype), jnp.zeros((), g.dtype))

    return latent_training(
        inner,
        sparsity,
        explored,
        when=when,
        saliency=saliency,
        allocate=allocate,
        mask=mask,
        prunable=prunable,
        masks=masks,
        key=key,
        backward_sparsity=backward_sparsity,
    )
