"""The exact k-th largest score by counting: one array, every slice of one, or a whole tree.

A cut divides the scores of a leaf: kept are those above its key, and of those equal to its key the
ones below its index. Cuts are totally ordered, so the cut that keeps exactly k weights is found by
bracketing: count what two cuts keep, take the part between, guess again. A pass over the scores is
two comparisons and two sums; no score moves, nothing is sorted, gathered or concatenated, and a
sharded array adds two scalars per leaf and pass to the wire.

Keys are the bits of the float, reordered so that unsigned order is descending score order: equal
zeros, infinities in place, NaN last. Comparing integers also sees the subnormals that the float
units of most backends flush to zero.
"""

import math
import operator
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune import _counting, _exact, _loops, _placement
from jaxprune._brackets import Brackets, Keys, Ranks, guess, narrow, ranks, second, within
from jaxprune._counting import Cut, halves
from jaxprune._leaves import Leaves


class Found(NamedTuple):
    """What a search gives.

    Attributes:
      masks: of each leaf.
      counts: how many weights each leaf is to keep, int32.
      bad: whether a score is NaN, of those alive.
    """

    masks: list[jax.Array]
    counts: jax.Array
    bad: jax.Array


_NOTHING = Found([], np.zeros(0, np.int32), np.zeros((), bool))  # type: ignore[arg-type]


@partial(jax.jit, static_argnames="kinds")
def top(
    leaves: Sequence[jax.Array],
    keep: Any,
    *,
    kinds: tuple[Any, ...] | None = None,
    alive: Sequence[jax.Array] | None = None,
) -> Found:
    """The ``keep[i]`` largest scores of each leaf, ties to the lower flat index.

    ``keep`` is a list of scalars or a vector. Small leaves of one of the ``kinds`` are searched in
    one go. Of the masks ``alive`` a part is kept, and where a score of theirs is NaN all.
    """
    if not leaves:
        return _NOTHING
    problem = Leaves(leaves, kinds=kinds, alive=alive)
    counts = jnp.asarray(keep, jnp.int32)
    state = _search(problem, problem.by_part(_loops.as_type(counts, jnp.uint32)[None]))
    return Found(problem.masks(state), counts, problem.bad)


@partial(jax.jit, static_argnames="axes")
def top_slices(leaf: jax.Array, keep: jax.Array, *, axes: tuple[int, ...]) -> jax.Array:
    """Mask of the ``keep`` largest scores of every slice along ``axes``.

    ``keep`` has the leaf's shape with 1 on ``axes``; ties go to the lower index within the slice,
    counted over ``axes`` in the order given.
    """
    problem = _Slices(leaf, axes)
    return problem.masks(_search(problem, keep.astype(jnp.uint32)[None]))[0]


@partial(jax.jit, static_argnames=("costs", "floors", "kinds", "counts_only"))
def top_shared(
    leaves: Sequence[jax.Array],
    budget: _exact.Wide,
    *,
    costs: tuple[int, ...],
    floors: tuple[int, ...],
    sizes: Sequence[Any] | None = None,
    kinds: tuple[Any, ...] | None = None,
    alive: Sequence[jax.Array] | None = None,
    counts_only: bool = False,
) -> Found:
    """The best weights of all leaves together; ties to the earlier leaf.

    Args:
      leaves: scores, of weights or of units.
      budget: what the kept weights may cost; no less than the floors cost.
      costs: of one weight of each leaf, below 2^32; all weights together cost less than 2^63.
      floors: the number of weights that each leaf keeps whatever the others score.
      sizes: for each leaf how many weights its units hold, one number or one for each unit; then
        the longest ranked prefix of units is kept that the budget pays for.
      kinds: of leaves; small ones of one kind are searched in one go.
      alive: masks of which a part is kept, and where a score of theirs is NaN all.
      counts_only: stop when the counts are known, without masks.
    """
    if not leaves:
        return _NOTHING
    problem = Leaves(leaves, sizes, kinds, alive)
    least = sum(cost * floor for cost, floor in zip(costs, floors, strict=True))
    pairs = zip(costs, leaves, strict=True)
    bound = _exact.LARGEST if sizes else sum(cost * leaf.size for cost, leaf in pairs)
    shared = _Shared(
        _exact.subtract(_exact.up_to(bound, budget), _exact.up_to(bound, _exact.constant(least))),
        bound=bound,
        costs=tuple(costs[i] for i in problem.order),
        floors=tuple(floors[i] for i in problem.order),
        rank=tuple(int(i) for i in problem.order),
    )
    state = _search(problem, None, shared, counts_only=counts_only)
    masks = [] if counts_only else problem.masks(state)
    counts = problem.by_leaf(_loops.as_type(state.want[0], jnp.int32))
    return Found(masks, counts, problem.bad)


@jax.jit
def top_units(units: jax.Array, sizes: jax.Array, keep: jax.Array) -> jax.Array:
    """Mask of the longest ranked prefix of units whose sizes, together, do not exceed ``keep``."""
    problem = Leaves((units,), (sizes,))
    (mask,) = problem.masks(_search(problem, keep.astype(jnp.uint32)[None, None]))
    return lax.optimization_barrier(mask)  # or every weight of a unit finds out again


class _Shared(NamedTuple):
    """What all leaves share: a budget for what they keep beyond the floors.

    All that they can keep costs up to ``bound``.
    """

    budget: _exact.Wide
    bound: int
    costs: tuple[int, ...]
    floors: tuple[int, ...]
    rank: tuple[int, ...]

    @property
    def plain(self) -> bool:
        """Whether every weight costs one."""
        return all(cost == 1 for cost in self.costs)

    def at_first(self, kept: Any) -> _exact.Wide:
        """What nothing and everything cost: ``kept``, which the compiler may know."""
        if isinstance(kept, np.ndarray):
            least = sum(map(operator.mul, self.costs, self.floors))
            return _exact.up_to(self.bound, _exact.constant([[0], [self.bound - least]]))
        return self.spent(kept)

    def spent(self, kept: jax.Array) -> _exact.Wide:
        """What it costs to keep so many weights of each leaf."""
        floors, costs = (
            np.broadcast_to(np.array(values, np.uint32), kept.shape)
            for values in (self.floors, self.costs)
        )
        beyond = _loops.minus(jnp.maximum(kept, floors), floors)
        cost = beyond if self.plain else _exact.multiply(beyond, costs)
        return _exact.total(cost, self.bound)


class _Slices:
    """One cut for each slice along ``axes``; the other axes of state arrays are the leaf's."""

    def __init__(self, leaf: jax.Array, axes: tuple[int, ...]):
        self.leaves, self.axes, self.keys = (leaf,), axes, Keys.of((leaf,))

    def zeros(self) -> Any:
        shape = (1 if axis in self.axes else n for axis, n in enumerate(self.leaves[0].shape))
        return jnp.zeros((2, *shape), jnp.uint32)

    def whole(self) -> Any:
        return np.uint32(math.prod(self.leaves[0].shape[axis] for axis in self.axes))

    @property
    def totals(self) -> jax.Array:
        return _counting.totals(self.leaves[0], self.axes).astype(jnp.float32)[None]

    def tally(self, cuts: Cut, step: jax.Array) -> jax.Array:
        count = partial(_counting.count, axes=self.axes, grain=self.keys.grain)
        return _counting.counts(_counting.by_backend(count, self.leaves[0], cuts, step))

    def masks(self, state: Brackets) -> list[jax.Array]:
        keep = partial(_counting.keep, axes=self.axes, grain=self.keys.grain)
        cuts = lax.optimization_barrier(state.answer())
        return [_counting.by_backend(keep, self.leaves[0], cuts, state.step)]


def _search(
    problem: Leaves | _Slices,
    want: jax.Array | None,
    shared: _Shared | None = None,
    *,
    counts_only: bool = False,
) -> Brackets:
    """Narrow every bracket until its cut keeps exactly what is wanted.

    With a shared budget all brackets are first one, over keys, until the key is found that the
    budget ends at; then each leaf's count is known.
    """
    state = _start(problem, want, shared)
    looking, spent = jnp.zeros((), bool), None
    if shared is not None:
        looking, spent = state.step == 0, shared.at_first(state.kept)
        _, everything = halves(spent)

    def unfinished(carry):
        state, looking, _ = carry
        return looking if counts_only else looking | state.unfinished()

    def narrower(carry):
        state, looking, spent = carry
        ranked = ranks(state)
        if shared is not None:
            least, most = halves(spent)
            gain, span = (_exact.subtract(x, least) for x in (shared.budget, most))
            pooled = Ranks(*map(_exact.to_float, (least, gain, span, everything)))
            ranked = jax.tree.map(partial(_loops.where, looking), pooled, ranked)
        guesses = guess(problem.keys, state, ranked)
        counts = lax.optimization_barrier(problem.tally(guesses, state.step))
        over = counts >= state.want
        if shared is None:
            over = lax.optimization_barrier(over)
            return narrow(state, guesses, over, counts, ranked.span), looking, spent
        now = lax.optimization_barrier(shared.spent(counts))
        beyond = _exact.less(shared.budget, now)
        over = lax.optimization_barrier(_loops.where(looking, beyond, over))
        state = narrow(state, guesses, over, counts, ranked.span)
        spent = jax.tree.map(partial(within, beyond), spent, now)
        least, _ = halves(spent)
        still = (looking & _exact.less(least, shared.budget) & ~state.tied[:, :1]).reshape(())
        still = lax.optimization_barrier(still)
        # Chosen and not branched: a branch takes longer to compile than sharing out takes.
        return _share_out(looking & ~still, problem.keys, state, least, shared), still, spent

    return lax.while_loop(unfinished, narrower, (state, looking, spent))[0]


def _start(problem: Leaves | _Slices, want: jax.Array | None, shared: _Shared | None) -> Brackets:
    """The widest bracket: nothing kept at its low end, everything at its high end."""
    keys, whole, zeros = problem.keys, problem.whole(), problem.zeros()
    given = [x for x in (want, *(shared.budget if shared else ())) if x is not None]
    if any(map(_placement.typed_by_mesh, (*problem.leaves, *given))):
        # Counts of an empty cut are zero, and of the type that a loop requires of its carry.
        nothing = jnp.asarray(zeros, keys.dtype)
        zeros = problem.tally(Cut(nothing, nothing), jnp.int32(0))
        zeros = sum((x * np.uint32(0) for x in given), zeros)
    zero = zeros[:1]
    size = zero + whole
    total, weights = problem.totals, (size | np.uint32(1)).astype(np.float32)
    if shared is not None:
        costs = np.array([shared.costs], np.float32)
        priced = total if shared.plain else total * costs
        total, weights = _loops.total(priced), (weights * costs).sum(keepdims=True)
    deviation = np.float32(np.sqrt(np.pi / 2)) * total / weights
    deviation = _loops.where((deviation > 0) & (deviation < jnp.inf), deviation, 1.0)
    unit = _counting.order(deviation, keys.dtype, keys.grain)
    ends = _loops.where(second(zeros), keys.number(keys.end), zeros.astype(keys.dtype))
    kept = _loops.where(second(zeros), size, zeros)
    return Brackets(
        ends=Cut(ends, kept.astype(keys.dtype)),
        kept=kept,
        size=size,
        want=size if want is None else zero + want,
        span=size.astype(np.float32),
        unit=(keys.number(keys.zero) - unit).astype(jnp.float32),
        step=zero.sum(dtype=np.uint32).astype(np.int32),
    )


def _share_out(
    found: jax.Array, keys: Keys, state: Brackets, least: _exact.Wide, shared: _Shared
) -> Brackets:
    """Where one key for all leaves is found, the count of each, and its bracket from there on."""
    below, above = halves(state.kept)
    base = jnp.maximum(below, np.array([shared.floors], np.uint32))
    room = jnp.maximum(above, base) - base
    bought = base + _spend(_exact.subtract(shared.budget, least), room, shared)
    want = lax.optimization_barrier(_loops.where(found, bought, state.want))  # or it is found often
    floored = second(state.kept) & found & (want > above)
    key = _loops.where(floored, keys.number(keys.end), state.ends.key)
    return state._replace(
        ends=state.ends._replace(key=key),
        kept=_loops.where(floored, state.size, state.kept),
        want=want,
    )


def _spend(rest: _exact.Wide, room: jax.Array, shared: _Shared) -> jax.Array:
    """How many of the ``room[i]`` tied weights of each leaf the rest pays for, in leaf order."""
    prices = jnp.asarray(np.array([shared.costs], np.uint32))
    worth = room if shared.plain else _exact.multiply(room, prices)
    before = _exact.before(worth, np.array(shared.rank), shared.bound)
    left = _exact.subtract(_exact.maximum(rest, before), before)
    if shared.plain:
        affordable = jnp.minimum(left.low, room)
        return affordable if left.high is None else _loops.where(left.high > 0, room, affordable)

    def try_bit(i, bits):
        trial = bits | (np.uint32(1 << 30) >> i.astype(jnp.uint32))
        affordable = ~_exact.less(left, _exact.multiply(trial, prices))
        return _loops.where((trial <= room) & affordable, trial, bits)

    return lax.fori_loop(0, 31, try_bit, jnp.zeros_like(room))
