"""Criteria that look at what arrives at a weight."""

import jax.numpy as jnp

from jaxprune import _tree
from jaxprune._typing import Params, PyTree, Scores


def wanda(params: Params, norms: PyTree) -> Scores:
    r"""Magnitude times the norm of the input feature that the weight multiplies.

    .. math:: s_{ij} = |w_{ij}| \, \|x_j\|_2

    Rank within each output: ``jp.mask_topk(scores, keep, axis=jp.fan_in_axes(apply, params, x))``.

    Args:
      params: a tree of arrays.
      norms: what ``jp.input_norms`` gave: arrays that broadcast against the weights, ``None`` where
        not governed.

    Returns:
      Scores like ``params``, float32 or wider, ``None`` where there is no norm.

    Raises:
      ValueError: without norms, or if one does not broadcast against its weight.
      TypeError: if a governed leaf is not floating.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.wanda({"w": jnp.array([[-2.0, 1.0]])}, {"w": jnp.array([[3.0]])})["w"].tolist()
      [[6.0, 3.0]]

    Reference:
      Sun, Liu, Bair, Kolter. A Simple and Effective Pruning Approach for Large Language Models,
      2024.
    """
    if norms is None:
        raise ValueError("wanda needs norms; pass jp.input_norms(apply, params, batches)")

    def score(path, w, norm):
        _tree.check_prunable(path, w)
        if norm.ndim != w.ndim or any(
            b not in (1, a) for a, b in zip(w.shape, norm.shape, strict=True)
        ):
            raise ValueError(
                f"{path}: norms of shape {norm.shape} do not broadcast against {w.shape}; "
                "take them from jp.input_norms(apply, params, batches)"
            )
        wide = _tree.widen(w)
        return jnp.abs(wide) * norm.astype(wide.dtype)

    return _tree.map_governed_with_path(score, params, norms)
