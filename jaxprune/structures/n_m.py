"""N:M: n of every m neighbours, at once or gradually."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _placement, _tree
from jaxprune._typing import Counts, Masking, Masks, Scores
from jaxprune.masks import axis_tree, check_scores, mask_topk, resolve_axes


def mask_n_m(scores: Scores, n: int, m: int, *, axis: Any) -> Masks:
    r"""Keep the ``n`` largest of each ``m`` neighbours along an axis; ties go to the earlier.

    .. math:: \textstyle\sum_{j \in g} m_j = n \quad \text{for every group } g \text{ of } m

    Args:
      scores: a tree of floating arrays, ``None`` where not governed. NaN ranks last.
      n: kept of each group.
      m: size of a group, consecutive along ``axis``.
      axis: the axis that a matmul contracts: an int, a tuple (flattened in that order), or a tree
        of these, such as ``jp.fan_in_axes`` gives.

    Returns:
      Bool masks like ``scores``.

    Raises:
      ValueError: if n > m, or m does not divide the axis.
      TypeError: if a score is not floating.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.mask_n_m({"w": jnp.array([1.0, 3.0, 2.0, 0.0])}, 2, 4, axis=0)["w"].tolist()
      [False, True, True, False]

    Reference:
      Mishra et al. Accelerating Sparse Deep Neural Networks, 2021.
    """
    check_pattern(n, m)
    check_scores(scores)

    def mask(path, leaf, along):
        axes = resolve_axes(path, leaf, along)
        check_divides(path, leaf, axes, m)
        return _placement.call_in_auto(lambda leaf: _n_of_m(leaf, n, m, axes), leaf)

    return _tree.map_governed_with_path(mask, scores, axis_tree(scores, axis))


def gradual_n_m(n: int, m: int, *, axis: Any) -> Masking:
    r"""N:M as a masking for transforms: the budget first takes what N:M will not keep.

    With N the weights that ``jp.mask_n_m`` keeps and k the budget of the leaf,

    .. math:: k \ge |N|:\; N \cup \operatorname{top}_{k - |N|}(\bar N), \qquad
      k < |N|:\; \operatorname{top}_k(N)

    Every leaf keeps exactly its budget; a budget of n/m, which ``jp.allocate_uniform`` gives at
    sparsity 1 - n/m, is exactly n:m. Budgets below it keep at most n of each m: with them
    ``jp.rigl`` drops and regrows inside the pattern.

    Args:
      n: kept of each group at the end.
      m: size of a group, consecutive along ``axis``.
      axis: the axis that a matmul contracts, as in ``jp.mask_n_m``.

    Returns:
      ``mask(scores, keep) -> masks``.

    Raises:
      ValueError: if n > m; from the masking, if m does not divide the axis, or ``keep`` does not
        fit.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> mask = jp.gradual_n_m(2, 4, axis=0)
      >>> mask({"w": jnp.array([1.0, 3.0, 2.0, 0.0])}, {"w": 3})["w"].tolist()
      [True, True, True, False]

    Reference:
      Zhu, Gupta. To prune, or not to prune: exploring the efficacy of pruning for model
      compression, 2017; Mishra et al. Accelerating Sparse Deep Neural Networks, 2021.
    """
    check_pattern(n, m)

    def mask(scores: Scores, keep: Counts) -> Masks:
        check_scores(scores, keep)
        survivors = mask_n_m(scores, n, m, axis=axis)

        def first(score, survivor, k):
            """Who competes: survivors for a budget below n:m, the others for what is above."""
            above = k >= survivor.size // m * n
            last = jnp.asarray(-jnp.inf, score.dtype)
            contending = jnp.where(jnp.isnan(score), last, score)
            return jnp.where(survivor == above, jnp.asarray(jnp.nan, score.dtype), contending)

        def places(survivor, k):
            most = survivor.size // m * n
            return jnp.where(k >= most, k - most, k)

        counts = _tree.map_governed(lambda _, k: jnp.asarray(k).astype(jnp.int32), scores, keep)
        chosen = mask_topk(
            _tree.map_governed(first, scores, survivors, counts),
            _tree.map_governed(places, survivors, counts),
        )
        return _tree.map_governed(
            lambda survivor, best, k: best | (survivor & (k >= survivor.size // m * n)),
            survivors,
            chosen,
            counts,
        )

    mask.__name__ = f"gradual_n_m({n}, {m})"
    return mask


def check_pattern(n: int, m: int) -> None:
    """Raise a ``ValueError`` unless n of m is a pattern."""
    if not 0 <= n <= m or m < 1:
        raise ValueError(f"{n}:{m} is no pattern; n of each m are kept, 0 <= n <= m")


def check_divides(path: str, leaf: Any, axes: tuple[int, ...], m: int) -> None:
    """Raise a ``ValueError`` unless groups of m fill the axes."""
    length = math.prod(leaf.shape[a] for a in axes)
    if length % m:
        raise ValueError(
            f"{path}: {m} does not divide the {length} entries along axes {axes} of shape "
            f"{leaf.shape}; choose another m or axis, or leave the leaf out with prunable"
        )


def _n_of_m(leaf: jax.Array, n: int, m: int, axes: tuple[int, ...]) -> jax.Array:
    """Rank each entry of a group against the others; m is small, so nothing is sorted."""
    rest = tuple(a for a in range(leaf.ndim) if a not in axes)
    groups = leaf.transpose(*rest, *axes)
    inside = groups.shape
    groups = groups.reshape(*inside[: len(rest)], -1, m)
    missing = jnp.isnan(groups)
    rank = [jnp.zeros(groups.shape[:-1], jnp.uint8 if m < 256 else jnp.int32) for _ in range(m)]
    for i in range(m):
        for j in range(i + 1, m):
            first = groups[..., i] >= groups[..., j]
            wins = (first | missing[..., j]) & ~(missing[..., i] & ~missing[..., j])
            rank[i] = rank[i] + (~wins).astype(rank[i].dtype)
            rank[j] = rank[j] + wins.astype(rank[j].dtype)
    kept = jnp.stack([r < n for r in rank], -1).reshape(inside)
    return kept.transpose(tuple(int(a) for a in np.argsort(rest + axes)))
