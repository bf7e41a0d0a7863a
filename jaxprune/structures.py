"""Masks that hardware likes: N:M, whole slices, blocks."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _placement, _sums, _topk, _tree
from jaxprune._typing import Counts, Masks, Scores
from jaxprune.masks import axis_tree, mask_topk, resolve_axes


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
    if not 0 <= n <= m or m < 1:
        raise ValueError(f"{n}:{m} is no pattern; n of each m are kept, 0 <= n <= m")

    def mask(path, leaf, along):
        axes = resolve_axes(path, leaf, along)
        length = math.prod(leaf.shape[a] for a in axes)
        if length % m:
            raise ValueError(
                f"{path}: {m} does not divide the {length} entries along axes {axes} of shape "
                f"{leaf.shape}; choose another m or axis, or leave the leaf out with prunable"
            )
        return _placement.call_in_auto(lambda leaf: _n_of_m(leaf, n, m, axes), leaf)

    _check(scores)
    return _tree.map_governed_with_path(mask, scores, axis_tree(scores, axis))


def mask_groups(scores: Scores, keep: Counts, *, axes: Any) -> Masks:
    r"""Keep whole slices along ``axes``, ranked by mean score.

    A slice runs along ``axes``, as in ``jnp.mean(scores, axes)``: for a ``(in, out)`` kernel,
    ``axes=0`` keeps or removes whole columns, one for each output.

    Args:
      scores: a tree of floating arrays, ``None`` where not governed.
      keep: int32 scalars like ``scores``, counting weights: the longest ranked prefix of whole
        slices that fits is kept.
      axes: an int or tuple of ints, or a tree of these.

    Returns:
      Bool masks like ``scores``.

    Raises:
      ValueError: if an axis does not exist, or ``keep`` does not fit the scores.
      TypeError: if a score is not floating.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.mask_groups({"w": jnp.array([[1.0, 5.0], [2.0, 0.0]])}, {"w": 3}, axes=0)["w"].tolist()
      [[False, True], [False, True]]

    Reference:
      Li, Kadav, Durdanovic, Samet, Graf. Pruning Filters for Efficient ConvNets, 2017.
    """

    def mask(path, leaf, k, along):
        over = resolve_axes(path, leaf, along)
        unit = math.prod(leaf.shape[a] for a in over)

        def slices(leaf, k):
            sums = _sums.reproducible_sum(leaf, over)
            return jnp.broadcast_to(mask_topk(sums, k // unit), leaf.shape)

        return _placement.call_in_auto(slices, leaf, jnp.asarray(k).astype(jnp.int32))

    _check(scores)
    return _tree.map_governed_with_path(mask, scores, keep, axis_tree(scores, axes))


def mask_blocks(scores: Scores, keep: Counts, *, block: Any, axes: Any = (-2, -1)) -> Masks:
    r"""Keep whole rectangular blocks over two axes, ranked by mean score.

    Blocks start at the origin; those at the edges are smaller where the block does not divide, and
    count for the weights that they hold. The blocks of all other axes are ranked together.

    Args:
      scores: a tree of floating arrays, ``None`` where not governed.
      keep: int32 scalars like ``scores``, counting weights: the longest ranked prefix of whole
        blocks that fits is kept.
      block: the size of a block along ``axes``: an int for squares, or a pair.
      axes: two axes (fan-in and fan-out of a Flax kernel by default), or a tree of pairs.

    Returns:
      Bool masks like ``scores``.

    Raises:
      ValueError: if a block is larger than the leaf, or an axis does not exist.
      TypeError: if a score is not floating.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.mask_blocks({"w": jnp.eye(4)}, {"w": 8}, block=2)["w"].astype(int).tolist()
      [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]

    Reference:
      Gray, Radford, Kingma. GPU Kernels for Block-Sparse Weights, 2017.
    """
    pair = (block, block) if isinstance(block, int) else tuple(block)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"block is {block}; give its size along both axes, an int or a pair")

    def mask(path, leaf, k, plane):
        over = resolve_axes(path, leaf, plane)
        if len(over) != 2 or any(leaf.shape[a] < b for a, b in zip(over, pair, strict=True)):
            raise ValueError(
                f"{path}: a block of {pair} along axes {over} does not fit shape {leaf.shape}; "
                "choose a smaller block or other axes, or leave the leaf out with prunable"
            )
        size = dict(zip(over, pair, strict=True))

        def blocks(leaf, k):
            sums, counts = _block_sums(leaf, size), _block_sizes(leaf.shape, size)
            kept = _topk.top_units(sums / counts.astype(sums.dtype), counts, k)
            for axis, step in size.items():
                kept = jnp.repeat(kept, step, axis, total_repeat_length=kept.shape[axis] * step)
                kept = jax.lax.slice_in_dim(kept, 0, leaf.shape[axis], axis=axis)
            return kept

        return _placement.call_in_auto(blocks, leaf, jnp.asarray(k))

    _check(scores)
    return _tree.map_governed_with_path(mask, scores, keep, axis_tree(scores, axes))


def _block_sums(leaf: jax.Array, size: dict[int, int]) -> jax.Array:
    wide = _tree.widen(leaf)
    pads = [(0, -n % size.get(a, 1)) for a, n in enumerate(leaf.shape)]
    wide = jnp.pad(wide, pads) if any(after for _, after in pads) else wide
    split: list[int] = []
    inner = []
    for axis, n in enumerate(wide.shape):
        step = size.get(axis, 1)
        inner.append(len(split) + 1)
        split += [n // step, step]
    sums = _sums.reproducible_sum(wide.reshape(split), tuple(inner))
    return sums.reshape(split[::2])


def _block_sizes(shape: tuple[int, ...], size: dict[int, int]) -> np.ndarray:
    """How many weights each block holds."""
    sizes = np.ones((), np.uint32)
    for axis, n in enumerate(shape):
        step = size.get(axis, 1)
        starts = np.arange(0, n, step)
        sizes = np.multiply.outer(sizes, np.minimum(step, n - starts).astype(np.uint32))
    return sizes


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


def _check(scores: Scores) -> None:
    for path, leaf in _tree.leaves_with_paths(scores):
        if leaf is not None:
            _tree.check_prunable(path, leaf)
