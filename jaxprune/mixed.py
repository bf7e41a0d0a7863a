"""Weights, slices, blocks and whole leaves under one budget."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _exact, _paths, _placement, _topk, _tree, allocation
from jaxprune._checks import check_min_keep, check_sparsity
from jaxprune._typing import Masks, PyTree, Scores
from jaxprune.masks import check_scores
from jaxprune.structures.units import Units, block_pair, blocks, check_size, groups


class Weights(NamedTuple):
    """Single weights as the units of ``jp.mask_mixed``."""


class Groups(NamedTuple):
    """Whole slices as units, as in ``jp.mask_groups``.

    Attributes:
      axes: along which a slice runs, an int or a tuple.
      size: slices in a group, neighbours along the last of the other axes.
    """

    axes: int | tuple[int, ...]
    size: int = 1


class Blocks(NamedTuple):
    """Rectangles as units, as in ``jp.mask_blocks``.

    Attributes:
      block: the size along both axes, an int or a pair.
      axes: two axes.
    """

    block: int | tuple[int, int]
    axes: tuple[int, int] = (-2, -1)


class Leaf(NamedTuple):
    """A whole leaf as one unit: kept or dropped, whatever ``min_keep`` says."""


Unit = Weights | Groups | Blocks | Leaf


def mask_mixed(
    scores: Scores,
    sparsity: Any,
    units: Mapping[str, Unit],
    *,
    default: Unit | None = None,
    min_keep: int = 1,
    costs: PyTree | None = None,
) -> Masks:
    r"""Remove weights, slices, blocks and leaves under one budget, the least valuable first.

    Units of all leaves and kinds are ranked together by the mean score of their weights, over the
    cost of a weight where there are costs; the longest prefix that fits is kept:

    .. math:: \max k: \; \textstyle\sum_{u \le k} c_u |u| \le (1 - s) \sum_u c_u |u|,
      \qquad \bar s_1 / c_1 \ge \bar s_2 / c_2 \ge \dots

    so that the sparsity is exact to the size of the last unit removed. Ties go to the earlier leaf,
    then the earlier unit. ``partial(jp.mask_mixed, units=...)`` is a masking: the counts of an
    allocation are added up to the budget.

    Args:
      scores: a tree of floating arrays, ``None`` where not governed.
      sparsity: fraction of all governed weights (with ``costs``, of their cost) to remove, a number
        or a floating scalar; or int32 counts like ``scores``, whose sum is what may be kept.
      units: ``{pattern: unit}`` with units ``jp.Weights()``, ``jp.Groups(axes, size)``,
        ``jp.Blocks(block, axes)`` and ``jp.Leaf()``; patterns are searched in paths, the first that
        matches wins.
      default: the unit of leaves that match no pattern.
      min_keep: weights that each leaf keeps at least, in whole units, unless its unit is a
        ``jp.Leaf()``.
      costs: a tree of positive numbers like ``scores``, the cost of one weight of each leaf.

    Returns:
      Bool masks like ``scores``; ``jp.explain`` shows how much each granularity took.

    Raises:
      ValueError: for a concrete sparsity outside [0, 1], a leaf without a unit, a unit that does
        not fit its leaf, a rule that can never apply, or a cost that is not positive.
      TypeError: if a score is not floating, or a rule is not a unit.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> scores = {"a": jnp.array([[5.0, 0.0], [4.0, 1.0]]), "b": jnp.array([3.0, 2.0])}
      >>> masks = jp.mask_mixed(scores, 0.5, {"a": jp.Groups(axes=0), "b": jp.Weights()})
      >>> masks["a"].astype(int).tolist(), masks["b"].tolist()
      ([[1, 0], [1, 0]], [True, False])

    Reference:
      Hoefler, Alistarh, Ben-Nun, Dryden, Peste. Sparsity in Deep Learning, 2021 (structures and
      their ranking).
    """
    check_scores(scores)
    check_min_keep(min_keep)
    tilings = _tilings(scores, units, default)
    leaves = jax.tree.leaves(scores)
    if not leaves:
        return scores
    means = [
        _placement.call_in_auto(lambda x, t=tiling: t.score(x, "mean"), leaf, small=True)
        for leaf, (_, tiling) in zip(leaves, tilings, strict=True)
    ]
    prices, ranked = allocation.priced(scores, means, costs)
    floors = tuple(_floor(unit, tiling, min_keep) for unit, tiling in tilings)
    found = _topk.top_shared(
        ranked,
        _budget(scores, sparsity, prices, floors),
        costs=tuple(prices),
        floors=floors,
        sizes=[tiling.sizes() for _, tiling in tilings],
    )
    spread = [
        _placement.call_in_auto(lambda _, mask, t=tiling: t.spread(mask), leaf, mask)
        for leaf, mask, (_, tiling) in zip(leaves, found.masks, tilings, strict=True)
    ]
    return _tree.unflatten(scores, spread)


def _tilings(
    scores: Scores, units: Mapping[str, Unit], default: Unit | None
) -> list[tuple[Unit, Units]]:
    """The unit of each governed leaf, and how the leaf falls into such units."""
    for pattern, rule in units.items():
        _check_unit(f"rule {pattern!r}", rule)
    if default is not None:
        _check_unit("default", default)
    taken = _paths.match(scores, units)
    bare = [path for path, pattern in taken.items() if pattern is None]
    if bare and default is None:
        raise ValueError(
            f"no unit for {', '.join(bare)}: give a pattern that matches, default=jp.Weights(), "
            "or leave them out with prunable"
        )
    found = []
    for path, leaf in _tree.leaves_with_paths(scores):
        if leaf is not None:
            chosen = taken[path]
            unit: Any = default if chosen is None else units[chosen]
            found.append((unit, _tiling(path, leaf, unit)))
    return found


def _check_unit(where: str, unit: Any) -> None:
    if not isinstance(unit, Weights | Groups | Blocks | Leaf):
        raise TypeError(
            f"{where}: {unit!r} is no unit; give jp.Weights(), jp.Groups(axes), jp.Blocks(block) "
            "or jp.Leaf()"
        )


def _tiling(path: str, leaf: Any, unit: Any) -> Units:
    if isinstance(unit, Groups):
        check_size(unit.size)
        return groups(path, leaf, unit.axes, unit.size)
    if isinstance(unit, Blocks):
        return blocks(path, leaf, block_pair(unit.block), unit.axes)
    shape = tuple(leaf.shape)
    return Units(shape, shape if isinstance(unit, Leaf) else (1,) * leaf.ndim)


def _floor(unit: Unit, tiling: Units, min_keep: int) -> int:
    """Weights that a leaf keeps at least, enough for whole units."""
    largest = math.prod(tiling.tile)
    most = math.prod(tiling.shape)
    # Units at the edges are smaller: one that is next in rank may fit no more.
    enough = -(-min_keep // largest) * largest if tiling.even else min_keep + largest - 1
    return 0 if isinstance(unit, Leaf) or min_keep == 0 else min(most, enough)


def _budget(
    scores: Scores, sparsity: Any, prices: list[int], floors: tuple[int, ...]
) -> _exact.Wide:
    """What the kept weights may cost, from a sparsity or from counts."""
    sizes = [leaf.size for leaf in jax.tree.leaves(scores)]
    if not _is_counts(sparsity):
        check_sparsity(sparsity)
        return allocation.priced_budget(sparsity, prices, sizes, floors)
    check_scores(scores, sparsity)
    counts = jax.tree.leaves(_tree.map_governed(lambda _, k: jnp.asarray(k), scores, sparsity))
    kept = jnp.stack([k.astype(jnp.uint32) for k in counts])
    paid = _exact.total(_exact.multiply(kept, jnp.asarray(np.array(prices, np.uint32))))
    least = sum(price * floor for price, floor in zip(prices, floors, strict=True))
    return _exact.maximum(jax.tree.map(jnp.squeeze, paid), _exact.constant(least))


def _is_counts(budget: Any) -> bool:
    if isinstance(budget, int | float):
        return False
    dtype = getattr(budget, "dtype", None)
    return dtype is None or jnp.issubdtype(dtype, jnp.integer)
