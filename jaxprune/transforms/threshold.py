"""The threshold rule: what scores too low is gone for good."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune import _checks, _sums, _tree
from jaxprune._leaves import any_nan
from jaxprune._tree import kernels
from jaxprune._typing import Prunable, Saliency, Trigger
from jaxprune.masks import axis_tree, bury, mask_threshold, mask_topk, resolve_axes, unless
from jaxprune.saliency.weights import gradient_magnitude
from jaxprune.transforms._driver import shrinking


def prune_below(
    inner: optax.GradientTransformation,
    threshold: float | optax.Schedule,
    *,
    when: Trigger,
    saliency: Saliency = gradient_magnitude,
    axes: Any = None,
    prunable: Prunable = kernels,
    min_keep: int = 1,
) -> optax.GradientTransformationExtraArgs:
    r"""Wrap an optimizer so that weights scoring at or below a threshold are removed for good.

    At every update t at which ``when`` fires,

    .. math:: m \leftarrow m \odot [\, s > \theta(t) \,]

    and their gradient is removed with them. With ``saliency=jp.magnitude`` this is weight clipping.
    Steps, exact zeros and NaN are as in ``jp.prune_gradually``.

    Args:
      inner: any optax optimizer.
      threshold: a number or an ``optax.Schedule``.
      when: the updates at which the rule is applied.
      saliency: ``(params, grads, key=) -> scores``.
      axes: remove whole slices, whose scores summed over these axes are at or below the threshold
        (weights already gone add nothing): an int, a tuple, or a tree of these.
      prunable: ``(path, leaf) -> bool``, which leaves are governed.
      min_keep: weights that each leaf keeps at least, its best; with ``axes`` they are its best
        slices, as many as hold that many weights.

    Returns:
      A transform whose state has ``masks``.

    Raises:
      ValueError: for a NaN threshold; from ``init`` and ``update`` as in ``jp.prune_gradually``.

    Example:
      >>> import optax, jaxprune as jp
      >>> tx = jp.prune_below(optax.sgd(0.1), 1e-3, when=jp.every(10), saliency=jp.magnitude)

    Reference:
      Han, Pool, Tran, Dally. Learning both Weights and Connections for Efficient Neural Networks,
      2015.
    """
    _checks.check_min_keep(min_keep)
    schedule = _checks.as_schedule(threshold, "threshold", _check_threshold)

    def propose(old, step, scores):
        scores = live = bury(old, scores)
        if axes is not None:
            live = _tree.map_governed(lambda s, m: jnp.where(m, s, 0), scores, old)
        kept = mask_threshold(live, schedule(step), axes=axes)
        best = _best(live, min_keep, axes)
        # Where nothing was ever kept there is nothing to save.
        new = _tree.map_governed(lambda k, b, m: (k | b) & m, kept, best, old)
        bad = any_nan(scores)
        return unless(bad, new, old), jnp.nan, bad  # no sparsity was asked for

    return shrinking(
        inner, propose, when=when, saliency=saliency, prunable=prunable, target=schedule
    )


def _best(scores, min_keep: int, axes: Any):
    """The floor: each leaf's best weights, or its best slices."""

    def floor(path, leaf, along):
        if along is None:
            return mask_topk(leaf, min(min_keep, leaf.size))
        over = resolve_axes(path, leaf, along)
        sums = _sums.reproducible_sum(leaf, over)
        slices = -(-min_keep * sums.size // leaf.size)
        return jnp.broadcast_to(mask_topk(sums, min(slices, sums.size)), leaf.shape)

    if axes is None:
        return _tree.map_governed_with_path(lambda path, leaf: floor(path, leaf, None), scores)
    return _tree.map_governed_with_path(floor, scores, axis_tree(scores, axes))


def _check_threshold(value: Any, name: str) -> None:
    if not isinstance(value, jax.core.Tracer) and np.isnan(float(value)):
        raise ValueError(f"{name} is NaN; give a number or a schedule")
