"""Scores and a sparsity become counts: how many weights each leaf keeps.

All totals are exact. The sparsity is rounded to float32; ``floor(n * sparsity + 1/2)`` of all
``n`` governed weights go, in integer arithmetic. Totals are split over leaves by Webster's divisor
method, which is house monotone: a leaf never keeps more weights at a higher sparsity.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune import _checks, _exact, _lamp, _loops, _placement, _topk, _tree
from jaxprune._typing import Counts, Masks, PyTree, Scores


def allocate_uniform(scores: Scores, sparsity: Any, *, min_keep: int = 1) -> Counts:
    r"""The same sparsity in every leaf, to within the rounding that makes the total exact.

    .. math:: k_i = \operatorname{round}(\lambda n_i), \quad \textstyle\sum_i k_i = (1 - s) n

    Args:
      scores: a tree of arrays, ``None`` where not governed; only shapes matter.
      sparsity: fraction of all governed weights to remove, a number or a traced scalar.
      min_keep: weights that each leaf keeps at least; where floors bind, the total is missed.

    Returns:
      int32 scalars like ``scores``.

    Raises:
      ValueError: for a concrete sparsity outside [0, 1].

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> int(jp.allocate_uniform({"w": jnp.ones(10)}, 0.9)["w"])
      1

    Reference:
      Balinski, Young. Fair Representation: Meeting the Ideal of One Man, One Vote, 1982 (Webster's
      method).
    """
    return _tree.unflatten(scores, list(uniform_counts(scores, sparsity, min_keep=min_keep)))


def uniform_counts(scores: Scores, sparsity: Any, *, min_keep: int = 1) -> jax.Array:
    """The counts of ``allocate_uniform`` as a vector."""
    leaves = _governed(scores, sparsity, min_keep)
    return _split(leaves, sparsity, [leaf.size for leaf in leaves], min_keep)


def allocate_erk(scores: Scores, sparsity: Any, *, min_keep: int = 1) -> Counts:
    r"""Erdős-Rényi-kernel: a leaf's density is proportional to the sum over product of its axes.

    .. math:: k_i = \min\left(n_i, \operatorname{round}(\varepsilon \textstyle\sum_a d_{ia})\right)

    where :math:`d_{ia}` are the sizes of all axes of leaf i and :math:`\varepsilon` makes the total
    exact; leaves that would pass density 1 are dense, and the rest is solved without them.

    Args:
      scores: a tree of arrays, ``None`` where not governed; only shapes matter.
      sparsity: fraction of all governed weights to remove, a number or a traced scalar.
      min_keep: weights that each leaf keeps at least; where floors bind, the total is missed.

    Returns:
      int32 scalars like ``scores``.

    Raises:
      ValueError: for a concrete sparsity outside [0, 1].

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> keep = jp.allocate_erk({"a": jnp.ones((90, 90)), "b": jnp.ones((10, 10))}, 0.9)
      >>> int(keep["a"]), int(keep["b"])
      (738, 82)

    Reference:
      Evci, Gale, Menick, Castro, Elsen. Rigging the Lottery: Making All Tickets Winners, 2020.
    """
    leaves = _governed(scores, sparsity, min_keep)
    weights = [sum(leaf.shape) or 1 for leaf in leaves]
    return _tree.unflatten(scores, list(_split(leaves, sparsity, weights, min_keep)))


def allocate_global(
    scores: Scores, sparsity: Any, *, min_keep: int = 1, costs: PyTree | None = None
) -> Counts:
    r"""The best weights of all leaves together, exactly: one threshold for the whole tree.

    .. math:: k_i = \#\{\, j : s_{ij} > \tau \,\}, \quad \textstyle\sum_i k_i = (1 - s) n

    Each leaf's best ``min_keep`` come first; the rest goes by (score, leaf, flat index).

    Args:
      scores: a tree of floating arrays, ``None`` where not governed.
      sparsity: fraction of all governed weights to remove, a number or a traced scalar.
      min_keep: weights that each leaf keeps at least; where floors bind, the total is missed.
      costs: a tree of positive numbers like ``scores``, the cost of one weight of each leaf (FLOPs,
        bytes). Then weights rank by score per cost, sparsity is the fraction of the total cost
        removed, and the longest ranked prefix that the budget pays for is kept.

    Returns:
      int32 scalars like ``scores``.

    Raises:
      ValueError: for a concrete sparsity outside [0, 1], or a cost that is not positive.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> keep = jp.allocate_global({"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0, 4.0])}, 0.25)
      >>> int(keep["a"]), int(keep["b"])
      (1, 2)

    Reference:
      Han, Pool, Tran, Dally. Learning both Weights and Connections for Efficient Neural Networks,
      2015; Frankle, Carbin. The Lottery Ticket Hypothesis, 2019 (global pruning).
    """
    found = shared_selection(scores, sparsity, min_keep=min_keep, costs=costs, counts_only=True)
    return _tree.unflatten(scores, list(found.counts))


def allocate_lamp(scores: Scores, sparsity: Any, *, min_keep: int = 1) -> Counts:
    r"""Layer-adaptive: one threshold on the score's share of the energy that it would leave.

    .. math:: \operatorname{lamp}(u) = s_u^2 \,/ \sum_{v:\, s_v \ge s_u} s_v^2

    with the sum over the leaf of u; equal scores are ranked by index, the earlier as the larger,
    and equal shares by leaf. Cuts of all leaves are found by counting, in some tens of passes.

    Args:
      scores: a tree of floating arrays, ``None`` where not governed; below zero counts as zero.
      sparsity: fraction of all governed weights to remove, a number or a traced scalar.
      min_keep: weights that each leaf keeps at least; where floors bind, the total is missed.

    Returns:
      int32 scalars like ``scores``.

    Raises:
      ValueError: for a concrete sparsity outside [0, 1].

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> keep = jp.allocate_lamp({"a": jnp.array([1.0, 1.0]), "b": jnp.array([9.0, 1.0])}, 0.25)
      >>> int(keep["a"]), int(keep["b"])
      (2, 1)

    Reference:
      Lee, Park, Mo, Ahn, Shin. Layer-adaptive sparsity for the Magnitude-based Pruning, 2021.
    """
    leaves = _governed(scores, sparsity, min_keep)
    if not leaves:
        return scores
    _, floors, budget = _bounds(leaves, sparsity, min_keep)
    find = partial(_lamp.layer_adaptive, floors=floors, kinds=_tree.kinds(scores))
    kept = _placement.call_in_auto(find, leaves, budget, small=True)
    return _tree.unflatten(scores, list(kept))


def allocate_owl(
    scores: Scores,
    sparsity: Any,
    *,
    outlier: float = 5.0,
    spread: float = 0.08,
    min_keep: int = 1,
) -> Counts:
    r"""Outlier-weighted: leaves with more outliers among their scores keep more.

    .. math:: d_i \propto 1 - s + 2\lambda \left(\frac{D_i - \min D}{\max D - \min D} -
       \overline{D}\right), \quad D_i = \operatorname{mean}_j [\, s_{ij} > M \bar s_i \,]

    where :math:`\overline{D}` is the mean of the fractions before it over all weights, and the
    total is exact.

    Args:
      scores: a tree of floating arrays, ``None`` where not governed, such as ``jp.wanda`` gives.
      sparsity: fraction of all governed weights to remove, a number or a traced scalar.
      outlier: M, how many times its leaf's mean a score must pass.
      spread: :math:`\lambda`, how far a leaf's density may be from the mean.
      min_keep: weights that each leaf keeps at least; where floors bind, the total is missed.

    Returns:
      int32 scalars like ``scores``.

    Raises:
      ValueError: for a concrete sparsity outside [0, 1].

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> scores = {"a": jnp.ones(100), "b": jnp.ones(100).at[0].set(99.0)}
      >>> keep = jp.allocate_owl(scores, 0.5)
      >>> int(keep["a"]), int(keep["b"])
      (42, 58)

    Reference:
      Yin et al. Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs
      to High Sparsity, 2024.
    """
    leaves = _governed(scores, sparsity, min_keep)
    if not leaves:
        return scores
    kept = 1 - jnp.clip(jnp.asarray(sparsity, jnp.float32), 0, 1)
    weights = _owl([_tree.widen(leaf) for leaf in leaves], kept, outlier, spread)
    return _tree.unflatten(scores, list(_split(leaves, sparsity, weights, min_keep)))


@jax.jit
def _owl(leaves, kept, outlier, spread) -> jax.Array:
    """How many weights each leaf would keep, before the total is made exact."""
    sizes = jnp.asarray(np.array([leaf.size for leaf in leaves], np.float32))
    bounds = [leaf > jnp.mean(leaf) * jnp.asarray(outlier, leaf.dtype) for leaf in leaves]
    fractions = jnp.stack([jnp.mean(bound, dtype=jnp.float32) for bound in bounds])
    low, high = jnp.min(fractions), jnp.max(fractions)
    unit = jnp.where(high > low, (fractions - low) / jnp.where(high > low, high - low, 1), 0)
    middle = jnp.sum(unit * sizes) / jnp.sum(sizes)
    density = jnp.clip(kept + 2 * spread * (unit - middle), 0, 1)
    return jnp.maximum(jnp.round(density * sizes), 1).astype(jnp.uint32)


def shared_selection(
    scores: Scores,
    sparsity: Any,
    *,
    min_keep: int = 1,
    costs: PyTree | None = None,
    alive: Masks | None = None,
    counts_only: bool = False,
) -> _topk.Found:
    """``allocate_global`` followed by ``mask_topk``, in one search."""
    leaves = _governed(scores, sparsity, min_keep)
    prices, leaves = priced(scores, leaves, costs)
    floors = tuple(min(min_keep, leaf.size) for leaf in leaves)
    budget = priced_budget(sparsity, prices, [leaf.size for leaf in leaves], floors)
    return _topk.top_shared(
        leaves,
        budget,
        costs=tuple(prices),
        floors=floors,
        kinds=_tree.kinds(scores),
        alive=None if alive is None else jax.tree.leaves(alive),
        counts_only=counts_only,
    )


def priced(
    scores: Scores, leaves: list[jax.Array], costs: PyTree | None
) -> tuple[list[int], list[jax.Array]]:
    """The cost of a weight of each governed leaf as an integer, and scores per cost."""
    if costs is None:
        return [1] * len(leaves), leaves
    return _prices(scores, costs), list(map(_per_cost, leaves, _numbers(scores, costs)))


def priced_budget(
    sparsity: Any, prices: Sequence[int], sizes: Sequence[int], floors: Sequence[int]
) -> _exact.Wide:
    """What the kept weights may cost; no less than what the floors cost."""
    everything = sum(price * size for price, size in zip(prices, sizes, strict=True))
    least = sum(price * floor for price, floor in zip(prices, floors, strict=True))
    return _budget(sparsity, everything, least)


def _governed(scores: Scores, sparsity: Any, min_keep: int) -> list[jax.Array]:
    """The governed leaves, after the checks that all allocations share."""
    _checks.check_sparsity(sparsity)
    _checks.check_min_keep(min_keep)
    for path, leaf in _tree.leaves_with_paths(scores):
        if leaf is not None:
            _tree.check_prunable(path, leaf)
    return jax.tree.leaves(scores)


@partial(jax.jit, static_argnames=("everything", "least"))
def _budget(sparsity: Any, everything: int, least: int) -> _exact.Wide:
    removed = _exact.round_product(sparsity, everything)
    kept = _exact.subtract(_exact.up_to(everything, _exact.constant(everything)), removed)
    kept = _exact.maximum(kept, _exact.up_to(everything, _exact.constant(least)))
    if kept.high is None:
        return kept
    # Of two words in one array the compiler makes one kernel, of two arrays two, both with it all.
    return _exact.Wide(*lax.optimization_barrier(jnp.stack(kept)))


def _bounds(
    leaves: Sequence[jax.Array], sparsity: Any, min_keep: int
) -> tuple[tuple[int, ...], tuple[int, ...], _exact.Wide]:
    """What leaves keep at most and at least, and what they keep together."""
    caps = tuple(leaf.size for leaf in leaves)
    floors = tuple(min(min_keep, cap) for cap in caps)
    return caps, floors, _budget(sparsity, sum(caps), sum(floors))


def _split(leaves, sparsity, weights, min_keep) -> jax.Array:
    """How many weights each leaf keeps, by their ``weights``: int32, one for each leaf."""
    if not leaves:
        return jnp.zeros((0,), jnp.int32)
    caps, floors, budget = _bounds(leaves, sparsity, min_keep)
    if not isinstance(weights, jax.Array):
        weights = np.array(weights, np.uint32)
    return _webster(budget, weights, caps=caps, floors=floors)


@partial(jax.jit, static_argnames=("caps", "floors"))
def _webster(
    budget: _exact.Wide,
    weights: jax.Array,
    *,
    caps: tuple[int, ...],
    floors: tuple[int, ...],
) -> jax.Array:
    """Seats by weight: clip(round(multiplier * weight), floor, cap), with the budget as their sum.

    A leaf's next seat comes at the multiplier (2 seats + 1) / (2 weight); two of these are equal or
    more than 2^-64 apart. So the seats are those of a multiplier in fixed point, 64 bits after the
    point, and of the next one for the leaves of an index below ``ahead``. Both are found bit by
    bit, as the largest that do not overspend.
    """
    weights, everything = jnp.asarray(weights)[None], sum(caps)
    cap, floor = (np.array([bound], np.uint32) for bound in (caps, floors))

    def seats(words, weights):
        high, middle, low, ahead = (words[i : i + 1] for i in range(4))
        step = (lax.iota(jnp.uint32, len(caps)) < ahead).astype(jnp.uint32)
        low = low + step
        middle = middle + (low < step).astype(jnp.uint32)
        high = high + ((middle == 0) & (low < step)).astype(jnp.uint32)
        products = _exact.multiply(weights, jnp.stack([high, middle, low]))
        whole, rounded, rest = (
            jax.tree.map(lambda x, i=i: x[i : i + 1], products) for i in range(3)
        )
        for word in (rest.high, jnp.uint32(1 << 31)):
            rounded = _exact.add(rounded, _exact.from_uint32(word))
        whole = _exact.add(whole, _exact.from_uint32(rounded.high))
        found = jnp.maximum(_loops.where(whole.high > 0, cap, jnp.minimum(whole.low, cap)), floor)
        return lax.optimization_barrier(found)

    # The first bit would be a multiplier above all caps; of the last word few bits are needed.
    skipped = 32 - len(caps).bit_length()

    def bit(i):
        place = i.astype(np.uint32)
        place = place + _loops.where(place < 96, np.uint32(0), np.uint32(skipped))
        value = np.uint32(1 << 31) >> (place & np.uint32(31))
        return _loops.where(place >> 5 == np.arange(4, dtype=np.uint32), value, np.uint32(0))

    def decide(carry):
        i, trial, _ = carry
        found = seats(trial, lax.optimization_barrier((weights, i))[0])  # or their halves are ahead
        over = _exact.less(budget, _exact.total(found, everything))[0]
        return i + 1, _loops.where(over, trial ^ bit(i), trial) | bit(i + 1), found

    # The last turn decides no bit: what is found is what was decided. The zero has the varying axes
    # that budget and weights have under shard_map. (A fori_loop would carry a second counter.)
    zero = (budget.low + weights[0, 0]) * np.uint32(0)
    start = jnp.int32(1), bit(np.int32(1)) + zero, cap + zero
    _, _, kept = lax.while_loop(lambda carry: carry[0] < 129 - skipped, decide, start)
    return _loops.as_type(kept[0], jnp.int32)


def _numbers(scores: Scores, costs: PyTree) -> list[float]:
    """The cost of each governed leaf as a Python number."""

    def check(path, leaf, cost):
        del leaf
        if not (np.ndim(cost) == 0 and float(cost) > 0 and np.isfinite(float(cost))):
            raise ValueError(f"{path}: the cost of a weight is {cost}; give a positive number")
        return float(cost)

    return jax.tree.leaves(_tree.map_governed_with_path(check, scores, costs))


def _prices(scores: Scores, costs: PyTree) -> list[int]:
    """Costs as integers, exact where their ratios allow it, else to as many bits as fit."""
    exact = [Fraction(cost) for cost in _numbers(scores, costs)]
    unit = Fraction(1, np.lcm.reduce([cost.denominator for cost in exact], dtype=object))
    whole = [int(cost / unit) for cost in exact]
    common = np.gcd.reduce(whole, dtype=object)
    whole = [cost // common for cost in whole]
    total = sum(cost * leaf.size for cost, leaf in zip(whole, jax.tree.leaves(scores), strict=True))
    excess = max(0, max(whole).bit_length() - 32, (total // _exact.LARGEST).bit_length())
    return [max(1, cost >> excess) for cost in whole]


def _per_cost(leaf: jax.Array, cost: float) -> jax.Array:
    return _loops.divide(_tree.widen(leaf), cost)
