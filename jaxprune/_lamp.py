"""Layer-adaptive counts by counting: no weight is moved to find how many each leaf keeps.

Among the weights of a leaf, ranked by score, the share of energy falls with rank: a weight's energy
falls, and what it is a share of grows. The least share that a cut can keep follows from the energy
of what it keeps, and no share behind the cut is larger. So the cuts of all leaves have an order,
and what a few in each leaf keep says of some that all of it is wanted, and of others that nothing
behind them is. Those are the ends of brackets; the next cuts lie between. Energies are added in a
fixed order, the last few by digits, so that they are the same on one device and on many.
"""

import operator
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune import _counting, _exact, _loops, _sums, _tree
from jaxprune._brackets import cuts_at, inside
from jaxprune._counting import Cut, halves
from jaxprune._leaves import Leaves, entries

_LINES = 256  # of energies are added as floats before digits are
_THIRDS = 3  # of so many passes one takes the thirds, so that all brackets shrink


class _Points(NamedTuple):
    """Cuts of every leaf, a row each, those that keep less first.

    Attributes:
      cut: keys and indices.
      kept: how many weights they keep, uint32.
      energy: the sum of their squared scores, in units of the leaf.
      late: how late the cut comes: the bits of 2 less those of the least share that it can keep.
    """

    cut: Cut
    kept: jax.Array
    energy: jax.Array
    late: jax.Array


class _State(NamedTuple):
    """The ends of all brackets; how late all that is wanted comes at first, and at last; passes."""

    ends: _Points
    first: jax.Array
    last: jax.Array
    step: jax.Array


class _Model(NamedTuple):
    """Where in its bracket a leaf reaches a lateness, if counts are linear in that, in float32.

    Attributes:
      part: of the way from the low end.
      rest: to the nearer end.
      rate: the part for one bit of lateness.
      curve: how far from linear a bracket of that extent is, in parts of ``rest``.
    """

    part: jax.Array
    rest: jax.Array
    rate: jax.Array
    curve: jax.Array


@partial(jax.jit, static_argnames=("floors", "kinds"))
def layer_adaptive(
    leaves: Sequence[jax.Array],
    budget: _exact.Wide,
    *,
    floors: tuple[int, ...],
    kinds: tuple[Any, ...] | None = None,
) -> jax.Array:
    """How many weights each leaf keeps of the ``budget`` with the largest shares: int32.

    Args:
      leaves: scores.
      budget: how many all keep; no less than the floors.
      floors: how many each keeps whatever the shares.
      kinds: of leaves; small ones of one kind are searched in one go.
    """
    return _Lamp(leaves, budget, floors, kinds).counts()


class _Lamp:
    def __init__(
        self,
        leaves: Sequence[jax.Array],
        budget: _exact.Wide,
        floors: tuple[int, ...],
        kinds: tuple[Any, ...] | None,
    ):
        self.leaves = Leaves(leaves, kinds=kinds, shaped=True)
        self.keys, self.rank = self.leaves.keys, self.leaves.order
        self.bound = sum(leaf.size for leaf in leaves)
        self.budget = _exact.up_to(self.bound, budget)
        self.floors = self.leaves.by_part(np.array([floors], np.uint32))
        # The order of points that come equally late.
        self.places = (4 * self.rank + np.arange(4)[:, None]).astype(np.uint32)
        self.dtype = jnp.dtype(jnp.float64 if self.keys.dtype == jnp.uint64 else jnp.float32)
        self.octave = jnp.finfo(self.dtype).nmant  # bits of shares that make one
        self.two = np.array(2, self.dtype).view(self.keys.dtype)[()]
        self.nan = self.two + self.keys.number(1)  # how late NaN comes
        units, endless = zip(*map(_measure, self.leaves.parts), strict=True)
        self.units = lax.optimization_barrier(list(units))
        self.unit, self.endless = (
            jnp.concatenate([x.reshape(1, -1) for x in parts], 1) for parts in (units, endless)
        )

    def counts(self) -> jax.Array:
        """Of the brackets that are left: no more than one leaf is open, or an end is the answer."""
        state = lax.while_loop(self.unfinished, self.narrower, self.start())
        few, many = halves(self.floored(state.ends.kept))
        left = _exact.subtract(self.budget, self.total(few)).low
        kept = _loops.where(many > few, jnp.minimum(few + left, many), few)
        full = ~_exact.less(self.budget, self.total(many))
        kept = _loops.where(full, many, kept)
        return self.leaves.by_leaf(kept[0].astype(jnp.int32))

    def floored(self, kept: jax.Array) -> jax.Array:
        return jnp.maximum(kept, np.broadcast_to(self.floors, kept.shape))

    def total(self, kept: jax.Array) -> _exact.Wide:
        """How many are kept altogether."""
        return _exact.total(kept, self.bound)

    def unfinished(self, state: _State) -> jax.Array:
        few, many = halves(self.floored(state.ends.kept))
        short = _exact.less(self.total(few), self.budget)
        over = _exact.less(self.budget, self.total(many))
        open_ = _loops.total((many > few).astype(jnp.float32)) > 1
        return short.reshape(()) & over.reshape(()) & open_

    def start(self) -> _State:
        """Nothing and everything, whose energy is that of half-normal scores of its mean."""
        keys, whole = self.keys, self.leaves.whole()
        sizes = whole.astype(np.float32)
        total = jnp.maximum(self.leaves.totals, 0.0)  # of none that is NaN
        mean = _sums.times_power(total, -self.unit) / sizes
        energy = (jnp.square(mean) * (sizes * np.float32(np.pi / 2))).astype(self.dtype)
        zero = (total > 0).astype(keys.dtype) * keys.number(0)

        def pair(few, many):
            many = jnp.asarray(many)
            rows = (jnp.broadcast_to(x, zero.shape).astype(many.dtype) for x in (few, many))
            return jnp.concatenate(list(rows)) + _twice(zero.astype(many.dtype))

        nothing = keys.number(0)
        cut = Cut(pair(nothing, keys.number(keys.end)), pair(nothing, nothing))
        ends = _Points(cut, pair(np.uint32(0), whole), pair(0, energy), pair(nothing, self.nan))
        first, last = halves(ends.late)
        return _State(ends, first[0, 0], last[0, 0], zero[0, 0].astype(jnp.int32))

    def narrower(self, state: _State) -> _State:
        """Of two cuts more in every leaf, those that are the ends now."""
        found = self.tally(self.guess(state), state.step)
        points = jax.tree.map(lambda x, y: jnp.concatenate([x[:1], y, x[1:]]), state.ends, found)
        (sure, place), (short, spot) = self.reached(points)
        ahead = _upto(points.late, self.places, sure, place)
        behind = ~_upto(points.late, self.places, short, spot)
        rows = [jax.tree.map(lambda x, i=i: x[i : i + 1], points) for i in range(4)]
        spots = [self.places[i : i + 1] for i in range(4)]
        low, high, last = rows[0], rows[3], jnp.asarray(spots[3])
        for i, j in zip(range(4), reversed(range(4)), strict=True):
            # Of cuts that keep as many the inner ones are ends, or a weight alone is never found.
            later = ahead[i : i + 1] | (rows[i].kept == low.kept)
            low = jax.tree.map(partial(_loops.where, later), rows[i], low)
            sooner = behind[j : j + 1] | (rows[j].kept == high.kept)
            high, last = jax.tree.map(
                partial(_loops.where, sooner), (rows[j], jnp.asarray(spots[j])), (high, last)
            )
        # One weight between two keys comes as late as the cut behind it.
        alone = (high.kept - low.kept <= 1) & (high.cut.key - low.cut.key <= 1)
        unwanted = alone & ~_upto(high.late, last, short, spot + np.uint32(1))
        closed = unwanted | (high.kept == low.kept)
        high = jax.tree.map(partial(_loops.where, closed), low, high)
        return _State(
            jax.tree.map(lambda *x: jnp.concatenate(x), low, high),
            jnp.maximum(state.first, sure),
            jnp.minimum(state.last, short),
            state.step + 1,
        )

    def reached(self, points: _Points) -> tuple[tuple[jax.Array, jax.Array], ...]:
        """The last place up to which all is wanted, and the last up to which more is.

        A place is how late, and of what comes as late up to which point. All is wanted up to a
        place if no more is kept by the first cuts from there on; more is if less is kept by the
        last cuts up to there. Both are found bit by bit.
        """
        size, spots = 8 * self.keys.dtype.itemsize, self.places.size.bit_length()
        late_bits = np.concatenate([_bits(size, self.keys.dtype), np.zeros(spots, self.keys.dtype)])
        spot_bits = np.concatenate([np.zeros(size, np.uint32), _bits(spots, np.uint32)])

        def fits(late, spot):
            upto = _upto(points.late, self.places, late[0], spot[0])
            same = (points.late == late[0]) & (self.places == spot[0])
            most = jnp.min(_loops.where(~upto | same, points.kept, points.kept[3:]), 0)
            upto = _upto(points.late, self.places, late[1], spot[1])
            least = jnp.max(_loops.where(upto, points.kept, points.kept[:1]), 0)
            above, below = halves(self.total(self.floored(jnp.stack([most, least]))))
            within = ~_exact.less(self.budget, above), _exact.less(below, self.budget)
            return jnp.concatenate([x.reshape(1) for x in within])

        def try_bit(carry, bits):
            trial = jax.tree.map(operator.or_, carry, bits)
            return jax.tree.map(partial(_loops.where, fits(*trial)), trial, carry), None

        zero = points.late[:2, 0] * self.keys.number(0)
        (late, spot), _ = lax.scan(try_bit, (zero, zero.astype(jnp.uint32)), (late_bits, spot_bits))
        return (late[0], spot[0]), (late[1], spot[1])

    def tally(self, cuts: Cut, step: jax.Array) -> _Points:
        """What two cuts of every leaf keep, and how late they come."""
        kept, keys = self.leaves.tally(cuts, step), self.keys
        parts = zip(self.leaves.parts, self.leaves.firsts, self.units, strict=True)
        energies = [_energy_at(part, cuts, i, step, unit, keys.grain) for part, i, unit in parts]
        energy = jnp.concatenate([x.astype(self.dtype) for x in energies], 1)
        energy = lax.optimization_barrier(energy)
        last = cuts.key - (cuts.end == keys.number(0)).astype(keys.dtype)
        own = self.energy(last)
        some = (own > 0) & ~_twice(self.endless)
        share = _loops.where(some, own / _loops.where(some, energy, 1.0), 0.0)
        share = _loops.where(last == keys.number(0), 1.0, share)  # of infinity
        late = self.two - lax.bitcast_convert_type(share, keys.dtype)
        late = _loops.where(last > keys.number(2 * keys.zero), self.nan, late)
        late = _loops.where(kept == np.uint32(0), keys.number(0), late)
        return _Points(cuts, kept, energy, late)

    def energy(self, key: jax.Array) -> jax.Array:
        """Of a weight with that key; zero for negative scores."""
        zero = self.keys.number(self.keys.zero)
        bits = (zero - jnp.minimum(key, zero)) << self.keys.number(self.keys.grain)
        score = _finite(lax.bitcast_convert_type(bits, self.dtype))
        return jnp.square(_sums.times_power(score, -jnp.broadcast_to(self.unit, score.shape)))

    def guess(self, state: _State) -> Cut:
        """Two cuts of each leaf, to both sides of where it is expected to reach what is wanted."""
        keys, ends = self.keys, state.ends
        one, zero = keys.number(1), keys.number(keys.zero)
        (low, high), (first, last) = map(halves, ends.cut)
        (few, many), (before, energy) = halves(ends.kept), halves(ends.energy)
        early, latest = halves(ends.late)
        tied = high - low <= one
        last = _loops.where(high == low, last, self.leaves.whole().astype(keys.dtype))
        width = _loops.where(tied, last - first, high - low)
        extent = width.astype(jnp.float32)
        late, apart = self.expected(state)
        share = lax.bitcast_convert_type(self.two - late, self.dtype)

        # The logarithms of shares, which lateness is, are nearly linear in those of scores. What
        # energies are off by in a bracket moves them, too.
        model = self.model(late, early, latest)
        between = jnp.maximum(many - few, np.uint32(1)).astype(jnp.float32)
        strewn = jnp.sqrt(model.rest * between) * share.astype(jnp.float32)
        strewn = strewn * np.float32(1.5 * 2.0**self.octave)
        place = model.part * extent
        margin = (model.curve * model.rest + model.rate * (apart + strewn)) * extent + 1.0

        # Energies of equal scores are linear in their number.
        own = self.energy(low)
        part = ((own / share - before) / jnp.maximum(energy - before, own)).astype(jnp.float32)
        place = _loops.where(tied, jnp.clip(part, 0.0, 1.0) * extent, place)
        margin = _loops.where(tied, (lax.rsqrt(between) + model.rate * apart) * extent, margin)

        # Where an end has no share: shares fall twice as fast as scores, or somewhat faster. Where
        # both have none: no score above the root of share and energy is late enough.
        fine = np.float32(2.0**-keys.grain)
        near, far = (
            _minus(*pair).astype(jnp.float32) * fine for pair in ((latest, late), (late, early))
        )
        root = jnp.sqrt(share * energy)
        root = lax.bitcast_convert_type(_sums.times_power(root, self.unit), keys.dtype)
        start = zero - jnp.minimum(root >> keys.number(keys.grain), zero)
        start = _minus(start, low).astype(jnp.float32)
        half = np.float32(2.0 ** (keys.octave - 1))
        no_low, no_high = ~tied & (early == keys.number(0)), ~tied & (latest >= self.two)
        for found, at, off in (
            (no_low, extent - near / 3, near / 6),
            (no_high, far / 3, far / 6),
            (no_low & no_high, start + half, half),
        ):
            place, margin = _loops.where(found, at, place), _loops.where(found, off + 1, margin)

        sure = (state.step % _THIRDS == _THIRDS - 1) | (margin > extent / 4)
        place, margin = (
            _loops.where(sure, extent * np.float32(1 / n), x) for x, n in ((place, 2), (margin, 6))
        )
        both = inside(jnp.concatenate([place - margin, place + margin]), width)
        both = both + _loops.where(tied, first, low)
        return lax.optimization_barrier(cuts_at(both, tied, low))

    def model(self, late: jax.Array, early: jax.Array, latest: jax.Array) -> _Model:
        """Of brackets between two latenesses."""
        rate = 1 / jnp.maximum(_minus(latest, early), self.keys.number(1)).astype(jnp.float32)
        part = _minus(jnp.minimum(late, latest), early).astype(jnp.float32) * rate
        curve = jnp.minimum(np.float32(2.0**-self.octave / 4) / rate, 0.4)
        return _Model(part, jnp.minimum(part, 1 - part), rate, curve)

    def expected(self, state: _State) -> tuple[jax.Array, jax.Array]:
        """How late what is wanted is reached, and how far off that may be, in float32."""
        keys, (few, many) = self.keys, halves(self.floored(state.ends.kept))
        early, latest = halves(state.ends.late)
        span = (many - few).astype(jnp.float32)
        gain = _exact.to_float(_exact.subtract(self.budget, self.total(few))).reshape(())

        def try_bit(late, bit):
            short = _loops.total(self.model(late | bit, early, latest).part * span) < gain
            return _loops.where(short, late | bit, late), None

        bits = _bits(8 * keys.dtype.itemsize, keys.dtype)
        late, _ = lax.scan(try_bit, state.first * keys.number(0), bits)
        late = jnp.minimum(jnp.maximum(late, state.first), state.last)
        model = self.model(late, early, latest)
        off = _loops.total(model.rest * span * model.curve)
        off = off + jnp.sqrt(_loops.total(model.rest * span)) * np.float32(0.6)
        apart = off / jnp.maximum(_loops.total(model.rate * span), np.float32(1e-30))

        # Where leaves keep as many of equal size, a third of one over that is not far off.
        wanted = jnp.maximum(_exact.to_float(self.budget).reshape(()), 1.0)
        start = (np.float32(len(self.rank) / 3) / wanted).astype(self.dtype)
        start = self.two - lax.bitcast_convert_type(start, keys.dtype)
        move = keys.number(1 << self.octave) << jnp.minimum(state.step, 6).astype(keys.dtype)
        no_first, no_last = state.first == keys.number(0), state.last >= self.two
        for found, at in (
            (no_first, _minus(state.last, move)),
            (no_last, state.first + move),
            (no_first & no_last, start),
        ):
            late = _loops.where(found, at, late)
        apart = _loops.where(no_first | no_last, np.float32(2.0 ** (self.octave - 1)), apart)
        return jnp.minimum(late, self.two - keys.number(1)), apart


@jax.jit
def _measure(part: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The power of two above the finite scores of each leaf, and whether any is infinite."""
    axes = tuple(range(1, part.ndim))
    endless = jnp.any(part == jnp.inf, axes, keepdims=True)  # a maximum would be NaN where any is
    return _sums.exponent(_finite(part), axes), endless


@partial(jax.jit, static_argnames="grain")
def _energy_at(part, cuts, first, step, unit, grain) -> jax.Array:
    """The energy of what entries ``first`` and following of two cuts keep of a part.

    A sum in a fixed order never falls when an energy is added, and neither does one of digits.
    """
    axes = tuple(range(1, part.ndim))
    kept = _counting.views(part, entries(cuts, first, part), step, axes, grain)
    part, _ = lax.optimization_barrier((part, step))
    energy = jnp.square(_sums.times_power(_finite(part), -jnp.broadcast_to(unit, part.shape)))
    both = jnp.stack([_loops.where(view, energy, 0.0) for view in kept])
    axes = tuple(axis + 1 for axis in axes)
    both = lax.optimization_barrier(both)
    lines = _loops.fold(jnp.add, both, axes, most=_LINES, least=_loops.unmixed(axes))
    lines = lax.optimization_barrier(lines * np.asarray(1 / _LINES, lines.dtype))
    sums = _sums.sum_of_digits(lines, axes) * np.asarray(_LINES, lines.dtype)
    return sums.reshape(2, len(part))


def _finite(x: jax.Array) -> jax.Array:
    """Scores, wide, with zero for negative and infinite ones and NaN."""
    wide = _tree.widen(x)
    return _loops.where((wide > 0) & (wide < jnp.inf), wide, 0.0)


def _bits(count: int, dtype: Any) -> np.ndarray:
    """So many powers of two, the largest first."""
    return np.array([1 << i for i in reversed(range(count))], dtype)


def _upto(late: jax.Array, places: Any, last: jax.Array, place: jax.Array) -> jax.Array:
    """Which points come up to a place."""
    return (late < last) | ((late == last) & (places <= place))


def _minus(x: jax.Array, y: jax.Array) -> jax.Array:
    """The difference, if it is one."""
    return jnp.maximum(x, y) - y


def _twice(x: jax.Array) -> jax.Array:
    return jnp.concatenate([x, x])
