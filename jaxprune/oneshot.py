"""Prune once."""

from typing import Any

import jax

from jaxprune import _checks, _tree
from jaxprune._tree import kernels, select
from jaxprune._typing import Allocation, Masking, Masks, Params, Prunable, Saliency
from jaxprune.allocation import allocate_global
from jaxprune.masks import allocate_and_mask, apply_masks, mask_topk
from jaxprune.saliency.weights import magnitude


def prune(
    params: Params,
    sparsity: Any,
    *,
    saliency: Saliency = magnitude,
    allocate: Allocation = allocate_global,
    mask: Masking = mask_topk,
    prunable: Prunable = kernels,
    grads: Params | None = None,
) -> tuple[Params, Masks]:
    r"""Score, count, mask: remove a fraction of the governed weights at once.

    .. math:: w \leftarrow m \odot w, \quad \textstyle\sum m = (1 - s) n

    Args:
      params: any tree of arrays; a weight that is NaN ranks last.
      sparsity: fraction s of all n governed weights to remove, a number or a traced scalar:
        floor(n s + 1/2) of them, but that ``allocate`` leaves every leaf one unless told otherwise;
        whole units (``mask_groups``, ``mask_blocks``) keep no more than that, and may keep none.
      saliency: ``(params, grads) -> scores``.
      allocate: ``(scores, sparsity) -> counts``.
      mask: ``(scores, counts) -> masks``.
      prunable: ``(path, leaf) -> bool``, which leaves are governed.
      grads: gradients like ``params``, for criteria that need them.

    Returns:
      The pruned parameters, and bool masks with ``None`` where not governed.

    Raises:
      ValueError: for a concrete sparsity outside [0, 1], nothing prunable, or missing gradients.
      TypeError: if a selected leaf is not floating, or a step of the pipeline cannot be called.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.prune({"kernel": jnp.array([[1.0, -2.0]])}, 0.5)[0]["kernel"].tolist()
      [[0.0, -2.0]]

    Reference:
      Han, Pool, Tran, Dally. Learning both Weights and Connections for Efficient Neural Networks,
      2015.
    """
    _checks.check_steps(saliency=saliency, allocate=allocate, mask=mask)
    governed = select(params, prunable)
    if not jax.tree.leaves(governed):
        raise ValueError("params holds no array; there is nothing to prune")
    masks = allocate_and_mask(saliency(governed, grads), sparsity, allocate, mask)
    _tree.check_masks(masks, governed)
    return apply_masks(params, masks), masks
