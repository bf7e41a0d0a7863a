"""Whole slices and blocks, ranked by one score each."""

import math
from functools import partial, reduce
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _loops, _placement, _sums, _topk, _tree
from jaxprune._typing import Counts, Masks, Scores
from jaxprune.masks import axis_tree, check_scores, resolve_axes

Score = Literal["mean", "sum", "max"]
_FEW = 16  # entries of a line that are added at once
_LAST_SHARDS = 16  # of the last axis that stay apart


def mask_groups(scores: Scores, keep: Counts, *, axes: Any, size: int = 1) -> Masks:
    r"""Keep whole slices along ``axes``, ranked by mean score.

    .. math:: m_g = [\, \operatorname{rank}(\bar s_g) < \lfloor k / |g| \rfloor \,]

    A slice runs along ``axes``, as in ``jnp.mean(scores, axes)``: for a ``(in, out)`` kernel,
    ``axes=0`` keeps or removes whole columns, one for each output, and ``size=head_dim`` whole
    heads, where the outputs are heads times ``head_dim``. Slices whose scores add up to more than
    the largest float are infinite, and tie.

    Args:
      scores: a tree of floating arrays, ``None`` where not governed.
      keep: int32 scalars like ``scores``, counting weights: the longest ranked prefix of whole
        slices that fits is kept.
      axes: an int or tuple of ints, or a tree of these. All axes of a leaf make it one slice.
      size: slices in a group, neighbours along the last of the other axes.

    Returns:
      Bool masks like ``scores``.

    Raises:
      ValueError: if an axis does not exist, ``size`` does not divide, or ``keep`` does not fit the
        scores.
      TypeError: if a score is not floating.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.mask_groups({"w": jnp.array([[1.0, 5.0], [2.0, 0.0]])}, {"w": 3}, axes=0)["w"].tolist()
      [[False, True], [False, True]]

    Reference:
      Li, Kadav, Durdanovic, Samet, Graf. Pruning Filters for Efficient ConvNets, 2017; Michel,
      Levy, Neubig. Are Sixteen Heads Really Better than One?, 2019.
    """
    check_size(size)
    check_scores(scores, keep)

    def mask(path, leaf, k, along):
        return _mask_units(leaf, k, groups(path, leaf, along, size), "mean")

    return _tree.map_governed_with_path(mask, scores, keep, axis_tree(scores, axes))


def mask_blocks(
    scores: Scores, keep: Counts, *, block: Any, axes: Any = (-2, -1), score: Score = "mean"
) -> Masks:
    r"""Keep whole rectangular blocks over two axes, ranked by the mean, sum or max of their scores.

    .. math:: \textstyle\sum_{b \text{ kept}} |b| \le k, \quad \text{the longest such prefix}

    Blocks start at the origin; those at the edges are smaller where the block does not divide, and
    count for the weights that they hold. The blocks of all other axes are ranked together. A leaf
    whose shards cut blocks is gathered: choose a size that divides the shards.

    Args:
      scores: a tree of floating arrays, ``None`` where not governed.
      keep: int32 scalars like ``scores``, counting weights: the longest ranked prefix of whole
        blocks that fits is kept.
      block: the size of a block along ``axes``: an int for squares, or a pair.
      axes: two axes (fan-in and fan-out of a Flax kernel by default), or a tree of pairs.
      score: "mean", "sum" or "max"; the first two differ at ragged edges only.

    Returns:
      Bool masks like ``scores``.

    Raises:
      ValueError: if a block is larger than the leaf, an axis does not exist, ``keep`` does not fit,
        or the score is none of the three.
      TypeError: if a score is not floating.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.mask_blocks({"w": jnp.eye(4)}, {"w": 8}, block=2)["w"].astype(int).tolist()
      [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]

    Reference:
      Gray, Radford, Kingma. GPU Kernels for Block-Sparse Weights, 2017.
    """
    pair = block_pair(block)
    if score not in get_args(Score):
        raise ValueError(f'score is {score!r}; blocks are scored by "mean", "sum" or "max"')
    check_scores(scores, keep)

    def mask(path, leaf, k, plane):
        return _mask_units(leaf, k, blocks(path, leaf, pair, plane), score)

    return _tree.map_governed_with_path(mask, scores, keep, axis_tree(scores, axes))


class Units(NamedTuple):
    """How a leaf falls into units: tiles of ``tile[a]`` along every axis a.

    Attributes:
      shape: of the leaf.
      tile: of a unit; those at the far edges are cut off.
    """

    shape: tuple[int, ...]
    tile: tuple[int, ...]

    @property
    def grid(self) -> tuple[int, ...]:
        """How many units there are along every axis."""
        return tuple(-(-n // t) for n, t in zip(self.shape, self.tile, strict=True))

    @property
    def single(self) -> bool:
        """Whether every weight is its own unit."""
        return math.prod(self.tile) == 1

    @property
    def even(self) -> bool:
        """Whether all units have the same size."""
        return not any(n % t for n, t in zip(self.shape, self.tile, strict=True))

    def sizes(self) -> np.ndarray:
        """How many weights each unit holds: one number if all hold the same."""
        if self.even:
            return np.asarray(math.prod(self.tile), np.uint32)
        sizes = np.ones((), np.uint32)
        for n, t in zip(self.shape, self.tile, strict=True):
            along = np.minimum(t, n - np.arange(0, n, t)).astype(np.uint32)
            sizes = np.multiply.outer(sizes, along)
        return sizes

    def score(self, leaf: jax.Array, how: Score) -> jax.Array:
        """One score for each unit."""
        wide = _tree.widen(leaf)
        if self.single:
            return wide
        fill = -jnp.inf if how == "max" else 0.0
        pads = [(0, -n % t) for n, t in zip(self.shape, self.tile, strict=True)]
        if not self.even:
            wide = jnp.pad(wide, pads, constant_values=fill)
        split = [part for g, t in zip(self.grid, self.tile, strict=True) for part in (g, t)]
        inner = tuple(range(1, len(split), 2))

        # Shards of an axis that lies in one unit stay apart; they do not divide an odd one.
        apart = [i for i in inner if split[i - 1] == 1 and split[i] % 2 == 0]
        least = {i: _LAST_SHARDS if i == inner[-1] else _loops.SHARDS for i in apart}
        folded = partial(self._folded, inner=inner, least=least)
        wide = wide.reshape(split)
        if how == "max":
            largest = jnp.max(*folded(jnp.maximum, wide))
            # XLA on CPU may lose a NaN in a maximum.
            nan = jnp.sum(*folded(jnp.add, jnp.where(jnp.isnan(wide), wide, 0.0)))
            return (largest + nan).reshape(self.grid)
        wide, axes = folded(jnp.add, wide)
        if any(wide.shape[axis] > 1 for axis in axes):
            wide = _sums.reproducible_sum(wide, axes)
        sums = wide.reshape(self.grid)
        return sums if how == "sum" else _loops.divide(sums, self.sizes())

    def _folded(self, combine, x, *, inner, least):
        """Few entries of every unit, and along which axes: lines that shards share, no others."""
        x = _loops.fold(combine, x, inner, least=least)
        *before, last = x.shape
        if last == 1:
            return x, inner
        # Entries within a line come first: only lines are added many at once.
        lines = last // _loops.LINE if inner[-1] in least and last % _loops.LINE == 0 else 1
        x = x.reshape(*before, lines, -1)
        if x.shape[-1] % _FEW == 0:
            parts = range(0, x.shape[-1], _FEW)
            x = reduce(combine, [x[..., first : first + _FEW] for first in parts])
        x = jax.lax.optimization_barrier(jnp.moveaxis(x, -1, 0))
        return _loops.fold(combine, x, (0,)), (0, *(axis + 1 for axis in inner))

    def spread(self, kept: jax.Array) -> jax.Array:
        """A mask of units as a mask of weights."""
        if self.single:
            return kept
        last = self.tile[-1]
        if last > 1:
            # Repeating entries is slow, repeating lines is fast: lines are made once.
            known = jnp.sum(kept, dtype=jnp.uint32)
            kept = _loops.apart(lambda m: jnp.repeat(m, last, -1), kept, known)
        split = [part for g in self.grid[:-1] for part in (g, 1)]
        full = [part for g, t in zip(self.grid[:-1], self.tile, strict=False) for part in (g, t)]
        padded = [g * t for g, t in zip(self.grid, self.tile, strict=True)]
        lines = kept.reshape(*split, padded[-1])
        mask = jnp.broadcast_to(lines, (*full, padded[-1])).reshape(padded)
        return mask if self.even else jax.lax.slice(mask, [0] * len(self.shape), self.shape)


def groups(path: str, leaf: Any, axes: Any, size: int) -> Units:
    """Slices along ``axes``, ``size`` of them together."""
    over = resolve_axes(path, leaf, axes)
    tile = [n if a in over else 1 for a, n in enumerate(leaf.shape)]
    others = [a for a in range(leaf.ndim) if a not in over]
    if size > 1:
        if not others or leaf.shape[others[-1]] % size:
            raise ValueError(
                f"{path}: shape {leaf.shape} has no groups of {size} slices along axes {over}: "
                f"the last of the other axes must be a multiple of {size}; give another size or "
                "other axes, or leave the leaf out with prunable"
            )
        tile[others[-1]] = size
    return Units(tuple(leaf.shape), tuple(tile))


def blocks(path: str, leaf: Any, pair: tuple[int, int], axes: Any) -> Units:
    """Blocks of ``pair`` over two axes."""
    over = resolve_axes(path, leaf, axes)
    if len(over) != 2 or any(leaf.shape[a] < b for a, b in zip(over, pair, strict=True)):
        raise ValueError(
            f"{path}: a block of {pair} along axes {over} does not fit shape {leaf.shape}; "
            "choose a smaller block or other axes, or leave the leaf out with prunable"
        )
    size = dict(zip(over, pair, strict=True))
    return Units(tuple(leaf.shape), tuple(size.get(a, 1) for a in range(leaf.ndim)))


def block_pair(block: Any) -> tuple[int, int]:
    """A block's size along both axes."""
    pair = (block, block) if isinstance(block, int) else tuple(block)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"block is {block}; give its size along both axes, an int or a pair")
    return pair


def check_size(size: int) -> None:
    """Raise a ``ValueError`` unless groups of ``size`` slices exist."""
    if size < 1:
        raise ValueError(f"size is {size}; a group has 1 slice or more")


def _mask_units(leaf: jax.Array, keep: Any, units: Units, how: Score) -> jax.Array:
    if units.even and how == "mean":
        how = "sum"  # The same ranks, without a division that could round two into a tie.

    mask = partial(_unit_mask, units=units, how=how)
    return _placement.call_in_auto(mask, leaf, jnp.asarray(keep).astype(jnp.int32))


@partial(jax.jit, static_argnames=("units", "how"))
def _unit_mask(leaf: jax.Array, keep: jax.Array, *, units: Units, how: Score) -> jax.Array:
    scores = units.score(leaf, how)
    return units.spread(_topk.top_units(scores, units.sizes(), keep))
