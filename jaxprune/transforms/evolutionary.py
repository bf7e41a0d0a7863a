"""Sparse evolutionary training: grow at random."""

import jax
import optax

from jaxprune._tree import kernels
from jaxprune._typing import Allocation, Masking, Masks, Prunable, Trigger
from jaxprune.allocation import allocate_erk
from jaxprune.masks import mask_topk
from jaxprune.saliency.weights import magnitude, random_saliency
from jaxprune.transforms.regrow import prune_and_grow


def sparse_evolutionary(
    inner: optax.GradientTransformation,
    sparsity: float,
    *,
    drop_fraction: float | optax.Schedule,
    when: Trigger,
    key: jax.Array,
    allocate: Allocation = allocate_erk,
    mask: Masking = mask_topk,
    prunable: Prunable = kernels,
    masks: Masks | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Sparse training that drops the smallest weights and grows others at random.

    .. math:: \text{drop: lowest } |w|, \qquad \text{grow: uniform at random}

    Args:
      inner: an optax optimizer whose state can be matched to single weights.
      sparsity: fraction of all governed weights that are zero throughout, in [0, 1].
      drop_fraction: fraction of a leaf's kept weights that move, a number or an ``optax.Schedule``.
      when: the updates at which they move.
      key: a PRNG key for the first masks and the growth.
      allocate: ``(scores, sparsity) -> counts``, used once.
      mask: ``(scores, counts) -> masks``.
      prunable: ``(path, leaf) -> bool``, which leaves are governed.
      masks: masks to start from; random ones at ``sparsity`` by default.

    Returns:
      A transform whose state has ``masks``; see ``jp.prune_and_grow``.

    Raises:
      ValueError: as ``jp.prune_and_grow``.

    Example:
      >>> import jax, optax, jaxprune as jp
      >>> tx = jp.sparse_evolutionary(optax.adamw(1e-3), 0.9, drop_fraction=0.3,
      ...                                        when=jp.every(100), key=jax.random.key(0))

    Reference:
      Mocanu, Mocanu, Stone, Nguyen, Gibescu, Liotta. Scalable training of artificial neural
      networks with adaptive sparse connectivity inspired by network science, 2018.
    """
    return prune_and_grow(
        inner,
        sparsity,
        drop=magnitude,
        grow=random_saliency,
        drop_fraction=drop_fraction,
        when=when,
        key=key,
        allocate=allocate,
        mask=mask,
        prunable=prunable,
        masks=masks,
    )
