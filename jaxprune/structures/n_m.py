"""N:M: n of every m neighbours, at once or gradually."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune import _counting, _loops, _placement, _topk, _tree
from jaxprune._typing import Counts, Masking, Masks, Scores
from jaxprune.masks import axis_tree, check_scores, mask_topk, resolve_axes

_MOST_PAIRS = 16  # Programs grow with the pairs in a group: larger ones are searched by counting.


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
    sparsity 1 - n/m, is exactly n:m. Allocations that favour some leaves over others, such as
    ``jp.allocate_global`` and ``jp.allocate_erk``, leave no leaf at n:m, as ``jp.explain`` notes.
    Budgets below n/m keep at
    most n of each m: with them ``jp.rigl`` drops and regrows inside the pattern.

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
    mask.n_m = (n, m)  # type: ignore[attr-defined]
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
    """The first n of each group, its entries ranked against each other; nothing is sorted."""
    if len(axes) > 1:
        rest = tuple(a for a in range(leaf.ndim) if a not in axes)
        lines = leaf.transpose(*rest, *axes)
        mask = _n_of_m(lines.reshape(*lines.shape[: len(rest)], -1), n, m, (len(rest),))
        return mask.reshape(lines.shape).transpose(tuple(int(a) for a in np.argsort(rest + axes)))
    (axis,) = axes
    shape = leaf.shape
    if m > _MOST_PAIRS:
        groups = leaf.reshape(*shape[:axis], shape[axis] // m, m, *shape[axis + 1 :])
        keep = jnp.full([1 if a == axis + 1 else d for a, d in enumerate(groups.shape)], n)
        return _topk.top_slices(groups, keep.astype(jnp.int32), axes=(axis + 1,)).reshape(shape)
    # Whole words, if that takes several groups.
    span = math.lcm(m, 4) if shape[axis] % math.lcm(m, 4) == 0 else m
    spans = leaf.reshape(*shape[:axis], shape[axis] // span, span, *shape[axis + 1 :])
    join = _join_minor if axis == leaf.ndim - 1 and span % 4 == 0 else _join
    mask = lax.platform_dependent(
        spans,
        cpu=lambda x: join(_words_apart(x, n, m, axis + 1), span, axis + 1),
        default=lambda x: jnp.stack(_verdicts(x, n, m, axis + 1), axis + 1),
    )
    return mask.reshape(shape)


def _verdicts(spans: jax.Array, n: int, m: int, axis: int) -> list[jax.Array]:
    """Whether each entry of a span is kept, ranked in its group of m."""
    wide = jnp.uint64 if spans.dtype == jnp.float64 else jnp.uint32
    entries = [lax.index_in_dim(spans, i, axis, keepdims=False) for i in range(spans.shape[axis])]
    keys = [_counting.order(entry, wide) for entry in entries]
    rank = [jnp.zeros(keys[0].shape, jnp.int32) for _ in keys]
    for i in range(len(keys)):
        for j in range(i + 1, (i // m + 1) * m):
            loses = keys[j] < keys[i]
            rank[i] = rank[i] + loses.astype(jnp.int32)
            rank[j] = rank[j] + (~loses).astype(jnp.int32)
    return [r < n for r in rank]


def _words(spans: jax.Array, n: int, m: int, axis: int) -> list[jax.Array]:
    """The verdicts on a span as bytes, four to a word, the first in the lowest byte."""
    verdicts = _verdicts(spans, n, m, axis)
    words = []
    for start in range(0, len(verdicts), 4):
        word = jnp.zeros(verdicts[0].shape, jnp.uint32)
        for i, kept in enumerate(verdicts[start : start + 4]):
            word = word | (kept.astype(jnp.uint32) << np.uint32(8 * i))
        words.append(word)
    return words


def _words_apart(spans: jax.Array, n: int, m: int, axis: int) -> list[jax.Array]:
    """The words, which no byte of them then computes again."""
    first = _counting.order(spans[(0,) * spans.ndim].astype(jnp.float32), jnp.uint32)
    return _loops.apart(lambda x: _words(x, n, m, axis), spans, first)


def _join(words: list[jax.Array], span: int, axis: int) -> jax.Array:
    """The verdicts from their words."""
    bits = [(words[i // 4] >> np.uint32(8 * (i % 4))) & np.uint32(1) for i in range(span)]
    return jnp.stack([bit != 0 for bit in bits], axis)


def _join_minor(words: list[jax.Array], span: int, axis: int) -> jax.Array:
    """The verdicts from their words, where these already lie as bytes do."""
    line = words[0]
    if len(words) > 1:
        line = _loops.apart(lambda w: jnp.stack(w, axis), words, line[(0,) * line.ndim])
    return lax.bitcast_convert_type(line, jnp.uint8).reshape(*words[0].shape, span) != 0
