"""The exact k-th largest score by counting: one array, every slice of one, or a whole tree.

A cut divides the scores of a leaf: kept are those above its key, and of those equal to its key the
ones below its index. Cuts are totally ordered, so the cut that keeps exactly k weights is found by
bracketing: count what a cut keeps, move one end of the bracket, guess again. A pass over the
scores is one comparison and one sum; no score moves, nothing is sorted, gathered or concatenated,
and a sharded array adds one scalar per leaf and pass to the wire.

Keys are the bits of the float, reordered so that unsigned order is descending score order: equal
zeros, infinities in place, NaN last. Comparing integers also sees the subnormals that the float
units of most backends flush to zero.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune import _counting, _exact

_MAX_LEAF = 2**31 - 1
_GRAIN = {jnp.dtype(jnp.bfloat16): 16, jnp.dtype(jnp.float16): 13}


@jax.jit
def top(leaves: Sequence[jax.Array], keep: Sequence[Any]) -> list[jax.Array]:
    """Masks of the ``keep[i]`` largest scores of each leaf, ties to the lower flat index."""
    if not leaves:
        return []
    problem = _whole_leaves(leaves)
    want = jnp.stack([jnp.asarray(k).astype(jnp.uint32) for k in keep])
    return _finish(_search(problem, problem.start(want)))


@partial(jax.jit, static_argnames="axes")
def top_slices(leaf: jax.Array, keep: jax.Array, *, axes: tuple[int, ...]) -> jax.Array:
    """Mask of the ``keep`` largest scores of every slice along ``axes``.

    ``keep`` has the leaf's shape with 1 on ``axes``; ties go to the lower index within the slice,
    counted over ``axes`` in the order given.
    """
    problem = _slices(leaf, axes)
    return _finish(_search(problem, problem.start(keep.astype(jnp.uint32))))[0]


@partial(jax.jit, static_argnames=("costs", "floors", "counts_only"))
def top_shared(
    leaves: Sequence[jax.Array],
    budget: _exact.Limbs,
    *,
    costs: tuple[int, ...],
    floors: tuple[int, ...],
    sizes: Sequence[Any] | None = None,
    counts_only: bool = False,
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Masks and counts of the best weights of all leaves together; ties to the earlier leaf.

    Args:
      leaves: scores, of weights or of units.
      budget: what the kept weights may cost; no less than the floors cost.
      costs: of one weight of each leaf, below 2^32.
      floors: the number of weights that each leaf keeps whatever the others score.
      sizes: for each leaf how many weights its units hold, one number or one for each unit; then
        the longest ranked prefix of units is kept that the budget pays for.
      counts_only: stop when the counts are known; the masks are then unfinished.
    """
    if not leaves:
        return [], []
    problem = _whole_leaves(leaves, sizes)
    shared = _Shared(budget, costs, floors)
    state = _search(problem, problem.start(None), shared, counts_only=counts_only)
    return _finish(state), list(state.want.astype(jnp.int32))


@jax.jit
def top_units(units: jax.Array, sizes: jax.Array, keep: jax.Array) -> jax.Array:
    """Mask of the longest ranked prefix of units whose sizes, together, do not exceed ``keep``."""
    problem = _whole_leaves((units,), (sizes,))
    return _finish(_search(problem, problem.start(keep.astype(jnp.uint32)[None])))[0]


class _Shared(NamedTuple):
    budget: _exact.Limbs
    costs: tuple[int, ...]
    floors: tuple[int, ...]


class _Problem(NamedTuple):
    """What is searched: the leaves, and how cuts and counts belong to them.

    ``split`` gives each leaf its part of a state array, ``tally`` sums views into one.
    """

    leaves: tuple[jax.Array, ...]
    indices: tuple[Callable[[jax.Array], jax.Array], ...]
    sizes: Any
    end: int
    grain: int
    split: Callable[[jax.Array], list[jax.Array]]
    tally: Callable[[Sequence[jax.Array]], jax.Array]

    @property
    def dtype(self):
        wide = any(leaf.dtype == jnp.float64 for leaf in self.leaves)
        return jnp.dtype(jnp.uint64 if wide else jnp.uint32)

    def views(self, key: jax.Array, index: jax.Array, step: jax.Array) -> tuple[jax.Array, ...]:
        """What the cut (key, index) keeps, a byte per weight.

        The barrier and the zero made of ``step`` tie keys and indices to the iteration; without
        them the compiler computes both once, ahead of the loop, and holds 8 bytes per weight.
        """
        leaves, step = lax.optimization_barrier((self.leaves, step))
        zero = jnp.minimum(step, 0).astype(jnp.uint32)
        parts = zip(leaves, self.indices, self.split(key), self.split(index), strict=True)
        return tuple(
            _counting.view(_counting.order(leaf, self.dtype) >> self.grain, at(zero), k, i)
            for leaf, at, k, i in parts
        )

    def start(self, want: jax.Array | None) -> "_State":
        """The widest bracket: nothing kept at its low end, everything at its high end."""
        shape = jnp.shape(self.sizes) if want is None else want.shape
        key = jnp.zeros(shape, self.dtype)
        if any(_counting.varying(leaf) for leaf in self.leaves):
            # Counts of the empty cut, all zero, vary over the axes that the leaves vary over, which
            # a loop under shard_map requires of its carry.
            views = self.views(key, key, jnp.int32(0))
            zero = self.tally(views)
        else:
            views = tuple(jnp.zeros_like(leaf, dtype=jnp.uint8) for leaf in self.leaves)
            zero = jnp.zeros(shape, jnp.uint32)
        low = zero.astype(self.dtype)
        size = zero + jnp.asarray(self.sizes, jnp.uint32)
        return _State(
            low=low,
            high=low + np.asarray(self.end, self.dtype),
            below=zero,
            above=size,
            size=size,
            want=size if want is None else want + zero,
            tied_key=low,
            tied=zero > 0,
            done=zero > 0,
            at=low,
            rose=zero > 0,
            widths=(low, low, low),
            step=jnp.sum(zero, dtype=jnp.uint32).astype(jnp.int32),
            views=views,
        )


class _State(NamedTuple):
    """A bracket per cut: ``low`` keeps ``below`` < ``want``, ``high`` keeps ``above`` >= ``want``.

    The bracket is over keys until two neighbours remain, then over the indices at ``tied_key``.
    """

    low: jax.Array
    high: jax.Array
    below: jax.Array
    above: jax.Array
    size: jax.Array
    want: jax.Array
    tied_key: jax.Array
    tied: jax.Array
    done: jax.Array
    at: jax.Array
    rose: jax.Array
    widths: tuple[jax.Array, jax.Array, jax.Array]
    step: jax.Array
    views: tuple[jax.Array, ...]

    def cut(self) -> tuple[jax.Array, jax.Array]:
        zero = jnp.zeros_like(self.at)
        return jnp.where(self.tied, self.tied_key, self.at), jnp.where(self.tied, self.at, zero)


def _search(
    problem: _Problem, state: _State, shared: _Shared | None = None, *, counts_only: bool = False
) -> _State:
    """Narrow every bracket until its cut keeps exactly what is wanted.

    The views travel in the loop's carry: a buffer that outlives the iteration is summed by a plain
    reduction, which vectorises, where a comparison fused into its own sum does not.
    """
    looking = jnp.asarray(shared is not None) | (state.step > 0)

    def unfinished(carry):
        state, looking = carry
        return looking if counts_only else looking | ~jnp.all(state.done)

    def body(carry):
        state, looking = carry
        counts = problem.tally(state.views)
        moved = _advance(problem, state, counts)
        if shared is not None:
            found, still = _advance_shared(problem, state, counts, shared)
            moved = jax.tree.map(lambda a, b: jnp.where(looking, a, b), found, moved)
            looking = looking & still
        return moved._replace(views=problem.views(*moved.cut(), moved.step)), looking

    return lax.while_loop(unfinished, body, (state, looking))[0]


def _advance(problem: _Problem, state: _State, counts: jax.Array) -> _State:
    """Each bracket on its own: move an end, turn to indices when two keys remain, guess again."""
    short = counts < state.want
    done = state.done | (counts == state.want)
    move_low, move_high = ~done & short, ~done & ~short
    state = state._replace(
        low=jnp.where(move_low, state.at, state.low),
        below=jnp.where(move_low, counts, state.below),
        high=jnp.where(move_high, state.at, state.high),
        above=jnp.where(move_high, counts, state.above),
        rose=move_low,
        done=done,
        step=state.step + 1,
        views=(),
    )
    return _guess_each(_settle(state))


def _settle(state: _State) -> _State:
    """Take the high end where it keeps what is wanted; turn to ties where two keys remain."""
    one, zero = jnp.ones_like(state.low), jnp.zeros_like(state.low)
    met = ~state.done & (state.above == state.want)
    state = state._replace(done=state.done | met, at=jnp.where(met, state.high, state.at))
    closed = ~state.done & (state.high - state.low == one)
    # Units of several weights may step over what is wanted; the cut below is then the answer.
    over, closed = closed & state.tied, closed & ~state.tied
    return state._replace(
        done=state.done | over,
        at=jnp.where(over, state.low, state.at),
        tied=state.tied | closed,
        tied_key=jnp.where(closed, state.low, state.tied_key),
        low=jnp.where(closed, zero, state.low),
        high=jnp.where(closed, state.size.astype(state.low.dtype), state.high),
    )


def _guess_each(state: _State) -> _State:
    counts = (state.below, state.want, state.above, state.size)
    guessed = _guess(state, *(count.astype(jnp.float32) for count in counts))
    return guessed._replace(at=jnp.where(state.done, state.at, guessed.at))


def _guess(
    state: _State, below: jax.Array, want: jax.Array, above: jax.Array, size: jax.Array
) -> _State:
    """The next cut to try, and the widths that tell whether the guesses make progress.

    Interpolates the log-odds of being kept, which are nearly linear in the bits of a float on both
    tails of the usual distributions. Aims half a standard deviation past the wanted rank, to the
    side of the end that did not move last, so that both ends close in. Halves the bracket while it
    spans octaves, and when three guesses did not.
    """
    width = state.high - state.low
    share = (want - below) / jnp.maximum(above - below, 1.0)
    slack = jnp.sqrt(jnp.maximum((want - below) * (1.0 - share), 0.25)) * np.float32(0.5)
    slack = jnp.where(above - below > 4.0, slack, 0.0)
    aim = jnp.clip(want + jnp.where(state.rose, slack, -slack), below + 0.5, above - 0.5)

    def odds(count):
        return jnp.log(count + 0.5) - jnp.log(size - count + 0.5)

    span = jnp.maximum(odds(above) - odds(below), 2.0**-20)
    part = jnp.clip((odds(aim) - odds(below)) / span, 2.0**-12, 1.0 - 2.0**-12)
    octaves = np.asarray(1 << (59 if width.dtype == jnp.uint64 else 27), width.dtype)
    stalled = (width > state.widths[2] // 2) | ((width > octaves) & ~state.tied)
    leap = jnp.where(stalled, width // 2, (part * width.astype(jnp.float32)).astype(width.dtype))
    one = jnp.ones_like(width)
    at = state.low + jnp.clip(leap, one, jnp.maximum(width, one + one) - one)
    history = jnp.where(stalled, jnp.full_like(width, np.iinfo(width.dtype).max), width)
    return state._replace(at=at, widths=(history, *state.widths[:2]))


def _advance_shared(
    problem: _Problem, state: _State, counts: jax.Array, shared: _Shared
) -> tuple[_State, jax.Array]:
    """One key for all leaves; once found, each leaf's count is known and its bracket small."""
    floors = jnp.asarray(np.array(shared.floors, np.uint32))
    costs = _exact.constant(shared.costs, 2)
    prices = None if all(cost == 1 for cost in shared.costs) else costs

    def spent(kept):
        number = _exact.from_uint32(jnp.maximum(kept, floors))
        return _exact.total(number if prices is None else _exact.multiply(number, prices))

    now = spent(counts)
    fits = ~_exact.less(shared.budget, now)
    state = state._replace(
        low=jnp.where(fits, state.at, state.low),
        below=jnp.where(fits, counts, state.below),
        high=jnp.where(fits, state.high, state.at),
        above=jnp.where(fits, state.above, counts),
        rose=fits | (state.step < 0),
        step=state.step + 1,
        views=(),
    )
    low = spent(state.below)
    totals = (low, shared.budget, spent(state.above), spent(state.size))
    looking = _guess(state, *map(_exact.to_float, totals))
    still = ~_exact.equal(low, shared.budget) & (state.high - state.low > 1)[0]

    base = jnp.maximum(state.below, floors)
    room = jnp.maximum(state.above, floors) - base
    rest = _exact.subtract(shared.budget, low)
    want = base + _spend(rest, room, prices)
    inside = want <= state.above
    met = want == state.below
    found = state._replace(
        want=want,
        done=met,
        at=state.low,
        low=jnp.where(inside, state.low, state.high),
        below=jnp.where(inside, state.below, state.above),
        high=jnp.where(inside, state.high, np.asarray(problem.end, state.high.dtype)),
        above=jnp.where(inside, state.above, state.size),
    )
    found = _guess_each(_settle(found))
    return jax.tree.map(lambda a, b: jnp.where(still, a, b), looking, found), still


def _spend(rest: _exact.Limbs, room: jax.Array, prices: _exact.Limbs | None) -> jax.Array:
    """How many of the ``room[i]`` tied weights of each leaf the rest pays for, in leaf order."""
    number = _exact.from_uint32(room)
    full = number if prices is None else _exact.multiply(number, prices)
    sums = _exact.cumulative(full)
    before = _exact.subtract(sums, full)
    left = _exact.subtract(_exact.maximum(rest, before), before)
    if prices is None:
        return _exact.to_uint32(_exact.minimum(left, number))
    bits = jnp.zeros_like(room)
    for bit in reversed(range(31)):
        trial = bits | np.uint32(1 << bit)
        cost = _exact.multiply(_exact.from_uint32(trial), prices)
        bits = jnp.where((trial <= room) & ~_exact.less(left, cost), trial, bits)
    return bits


def _finish(state: _State) -> list[jax.Array]:
    return [view.astype(bool) for view in state.views]


def _whole_leaves(leaves: Sequence[jax.Array], sizes: Sequence[Any] | None = None) -> _Problem:
    leaves = tuple(leaves)

    weights = [np.uint32(1)] * len(leaves) if sizes is None else list(sizes)

    def number(view, size):
        if np.ndim(size):
            return jnp.sum(view.astype(jnp.uint32) * size.astype(jnp.uint32), dtype=jnp.uint32)
        units = _counting.count(view, tuple(range(view.ndim))).reshape(())
        return units if sizes is None else units * jnp.asarray(size).astype(jnp.uint32)

    def whole(leaf, size):
        if np.ndim(size):
            return jnp.sum(size.astype(jnp.uint32), dtype=jnp.uint32)
        return np.uint32(leaf.size) * jnp.asarray(size).astype(jnp.uint32)

    def count(views):
        return jnp.stack(list(map(number, views, weights)))

    indices = [_counting.indices(leaf.shape, tuple(range(leaf.ndim))) for leaf in leaves]
    total: Any = np.array([leaf.size for leaf in leaves])
    if sizes is not None:
        total = jnp.stack(list(map(whole, leaves, weights)))
    return _problem(leaves, indices, total, list, count)


def _slices(leaf: jax.Array, axes: tuple[int, ...]) -> _Problem:
    size = math.prod(leaf.shape[axis] for axis in axes)
    index = _counting.indices(leaf.shape, axes)
    return _problem((leaf,), [index], size, _alone, lambda views: _counting.count(views[0], axes))


def _alone(state: jax.Array) -> list[jax.Array]:
    return [state]


def _problem(leaves, indices, sizes, split, count) -> _Problem:
    for leaf in leaves:
        if leaf.size > _MAX_LEAF:
            raise ValueError(f"a leaf of shape {leaf.shape} has more than 2^31 - 1 weights")
    grain = min(_GRAIN.get(leaf.dtype, 0) for leaf in leaves)
    wide = any(leaf.dtype == jnp.float64 for leaf in leaves)
    end = (((1 << (64 if wide else 32)) - 2) >> grain) + 1
    return _Problem(tuple(leaves), tuple(indices), sizes, end, grain, split, count)
