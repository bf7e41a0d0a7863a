"""Any saliency as a layerwise method: masks by score, weights left as they are."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import _checks, _rows, _tree
from jaxprune._typing import Layerwise, Params, PyTree, Scores
from jaxprune.allocation import allocate_uniform
from jaxprune.layerwise import _driver
from jaxprune.masks import apply_masks, mask_topk
from jaxprune.structures.n_m import mask_n_m


def by_saliency(saliency: Any, *, per_output: bool = True) -> Layerwise:
    r"""A saliency such as ``jp.wanda`` or ``jp.magnitude`` as a layerwise method.

    .. math:: m = \operatorname{topk}(s(w, \|x\|)), \quad \|x_j\| = \sqrt{G_{jj}}

    Args:
      saliency: ``saliency(params, norms) -> scores``.
      per_output: rank within each output; otherwise within the whole leaf.

    Returns:
      ``method(params, grams, sparsity=None, *, n_m=None) -> (params, masks)``.

    Raises:
      ValueError: from the method, if a Gram does not fit its leaf, m does not divide the fan-in, or
        not exactly one of ``sparsity`` and ``n_m`` is given.
      TypeError: if ``saliency`` takes other arguments; from the method, if a leaf of ``grams`` is
        not a ``jp.Gram``.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> grams = {"w": jp.Gram(jnp.diag(jnp.array([9.0, 1.0])), axes=(0,))}
      >>> method = jp.by_saliency(jp.wanda)
      >>> method({"w": jnp.array([[1.0], [2.0]])}, grams, 0.5)[0]["w"].ravel().tolist()
      [1.0, 0.0]
    """
    _checks.check_step("criterion", saliency, "saliency")

    def method(
        params: Params,
        grams: PyTree,
        sparsity: Any = None,
        *,
        n_m: tuple[int, int] | None = None,
    ):
        _driver.check_target(sparsity, n_m)

        def norm(path, leaf, gram):
            _driver.check_gram(path, leaf, gram, n_m)
            diagonal = jnp.diagonal(gram.matrix, axis1=-2, axis2=-1)
            return _rows.to_features(jnp.sqrt(diagonal), leaf.shape, gram.use)

        norms = _tree.map_governed_with_path(norm, params, grams)
        governed = _tree.map_governed(lambda p, _: p, params, norms)
        scores: Scores = saliency(governed, norms)
        _tree.map_governed_with_path(_raise_if_nan, scores)
        axes = jax.tree.map(
            lambda _, g: None if g is None else g.axes, params, grams, is_leaf=_tree.is_none
        )
        if n_m is not None:
            masks = mask_n_m(scores, *n_m, axis=axes)
        else:
            targets = _driver.per_leaf(governed, sparsity)
            keep = _tree.map_governed(lambda s, t: allocate_uniform([s], t)[0], scores, targets)
            masks = mask_topk(scores, keep, axis=axes if per_output else None)
        return apply_masks(params, masks), masks

    return method


def _raise_if_nan(path: str, scores: jax.Array) -> None:
    if _checks.is_concrete(scores) and bool(jnp.any(jnp.isnan(scores))):
        raise ValueError(
            f"{path}: its scores are NaN; look for NaN or overflow in the weights and the "
            "calibration batches"
        )
