"""The best weights for given masks."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune import _tree
from jaxprune._typing import Masks, Params, PyTree
from jaxprune.layerwise import _driver
from jaxprune.layerwise._refit import refit


def reconstruct(
    params: Params, masks: Masks, grams: PyTree, *, damping: float = 0.0, steps: int | None = None
) -> Params:
    r"""Least-squares weights for given masks: the outputs stay as close as the masks allow.

    .. math:: \min_{\hat w} \|X (\hat w - w)\|^2 + \delta \overline{\operatorname{diag} G}
       \|\hat w - w\|^2 \quad \text{s.t. } \hat w = 0 \text{ where pruned}

    Args:
      params: the dense weights.
      masks: bool masks like ``params``, ``None`` where not governed.
      grams: ``jp.Gram`` leaves like ``params``, ``None`` where not governed.
      damping: pull towards the dense weights, relative to the Gram's mean diagonal.
      steps: conjugate gradient steps at most; by default as many as the fan-in.

    Returns:
      A tree like ``params``; exactly zero where pruned, unchanged where there is no mask.

    Raises:
      ValueError: if a weight is not finite, the damped Gram is not positive definite, or masks or
        Grams do not fit.
      TypeError: if a mask is not bool or a leaf of ``grams`` is not a ``jp.Gram``.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> grams = {"w": jp.Gram(jnp.array([[2.0, 1.0], [1.0, 2.0]]), axes=(0,))}
      >>> masks = {"w": jnp.array([[False], [True]])}
      >>> jp.reconstruct({"w": jnp.array([[1.0], [2.0]])}, masks, grams)["w"].ravel().tolist()
      [0.0, 2.5]

    Reference:
      Frantar, Singh, Alistarh. Optimal Brain Compression: A Framework for Accurate Post-Training
      Quantization and Pruning, 2022.
    """
    _tree.check_masks(masks, params)

    def one(path, leaf, mask, gram):
        _driver.check_gram(path, leaf, gram, None)
        _driver.check_finite(path, leaf)
        rows, kept = _driver.as_groups(leaf, gram), _driver.as_rows(mask, gram)
        limit = rows.shape[-1] if steps is None else steps
        matrix = _driver.matrices(gram)
        new, healthy = _solve(rows, kept, matrix, jnp.asarray(damping, matrix.dtype), limit)
        _driver.raise_unless(path, healthy, gram)
        return _driver.back(new, leaf, gram).astype(leaf.dtype)

    new = _tree.map_governed_with_path(one, params, masks, grams)
    return jax.tree.map(lambda p, n: p if n is None else n, params, new, is_leaf=_tree.is_none)


@partial(jax.jit, static_argnums=4)
def _solve(rows, masks, gram, damping, limit):
    def one(rows, mask, gram):
        damped, alive = _driver.regularize(gram, damping)
        scale = lax.rsqrt(jnp.diagonal(damped))
        scaled = damped * scale[:, None] * scale[None, :]
        lower, healthy = _driver.factor(scaled)
        identity = jnp.eye(lower.shape[0], dtype=lower.dtype)
        inverse = jax.scipy.linalg.cho_solve((lower, True), identity)
        mask_alive = mask & alive[None, :]
        dense = jnp.where(alive[None, :], rows / scale[None, :], 0)
        start = jnp.where(mask_alive, dense, 0)
        new, _ = refit(start, dense, mask_alive, scaled, inverse, limit)
        return new * scale[None, :], healthy

    new, healthy = _driver.over_groups(one, rows, masks, gram)
    return new, jnp.all(healthy)
