"""RigL: grow where the gradient is large."""

import jax
import optax

from jaxprune._tree import kernels
from jaxprune._typing import Allocation, Masking, Masks, Prunable, Trigger
from jaxprune.allocation import allocate_erk
from jaxprune.masks import mask_topk
from jaxprune.saliency.weights import gradient_magnitude, magnitude
from jaxprune.transforms.regrow import prune_and_grow


def rigl(
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
    r"""Sparse training that drops the smallest weights and grows the largest gradients.

    .. math:: \text{drop: lowest } |w|, \qquad \text{grow: highest } |\partial L / \partial w|

    Args:
      inner: an optax optimizer whose state can be matched to single weights.
      sparsity: fraction of all governed weights that are zero throughout, in [0, 1].
      drop_fraction: fraction of a leaf's kept weights that move, a number or an ``optax.Schedule``;
        the paper decays 0.3 by a cosine.
      when: the updates at which they move; the paper stops at three quarters of training.
      key: a PRNG key for the first masks.
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
      >>> tx = jp.rigl(optax.adamw(1e-3), 0.9, key=jax.random.key(0), when=jp.every(100, end=750),
      ...              drop_fraction=optax.cosine_decay_schedule(0.3, 750))

    Reference:
      Evci, Gale, Menick, Castro, Elsen. Rigging the Lottery: Making All Tickets Winners, 2020.
    """
    return prune_and_grow(
        inner,
        sparsity,
        drop=magnitude,
        grow=gradient_magnitude,
        drop_fraction=drop_fraction,
        when=when,
        key=key,
        allocate=allocate,
        mask=mask,
        prunable=prunable,
        masks=masks,
    )
