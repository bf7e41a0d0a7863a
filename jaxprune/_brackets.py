"""Brackets around cuts, narrowed by what two guesses between their ends keep."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune import _counting, _loops
from jaxprune._counting import Cut, halves

_MAX_LEAF = 2**31 - 1
_PATIENCE = 3  # passes after which scores are not half-normal where brackets do not shrink
_GRAIN = {jnp.dtype(jnp.bfloat16): 16, jnp.dtype(jnp.float16): 13}


class Keys(NamedTuple):
    """The type of keys, and how many of their lowest bits are zero in all of them."""

    dtype: Any
    grain: int

    @classmethod
    def of(cls, leaves: Sequence[jax.Array]) -> "Keys":
        for leaf in leaves:
            if leaf.size > _MAX_LEAF:
                raise ValueError(f"a leaf of shape {leaf.shape} has more than 2^31 - 1 weights")
        wide = any(leaf.dtype == jnp.float64 for leaf in leaves)
        grain = min(_GRAIN.get(leaf.dtype, 0) for leaf in leaves)
        return cls(jnp.dtype(jnp.uint64 if wide else jnp.uint32), grain)

    def number(self, value: int) -> Any:
        return np.asarray(value, self.dtype)

    @property
    def zero(self) -> int:
        """The key of a score of zero."""
        return _counting.infinity(self.dtype) >> self.grain

    @property
    def end(self) -> int:
        """Past the last key, which is that of NaN."""
        return 2 * self.zero + 2

    @property
    def octave(self) -> int:
        """How many bits the keys from one power of two to the next take."""
        return (52 if self.dtype == jnp.uint64 else 23) - self.grain


class Brackets(NamedTuple):
    """A bracket per cut: its low end keeps less than is wanted, its high end as much or more.

    It is over keys until two neighbours remain, then over the indices at the lower one. A first
    axis with two entries is for the low end and the high one, or the lower guess and the higher;
    arrays in pairs are half the kernels to compile. Elsewhere that axis has size 1.

    Attributes:
      ends: two cuts.
      kept: what they keep, uint32.
      size: how many weights there are, uint32.
      want: how many are to be kept, uint32.
      span: how many weights, or what they cost, were in the bracket before the last pass, float32.
      unit: zero less the key of the standard deviation that half-normal scores of that mean have,
        float32.
      step: passes done.
    """

    ends: Cut
    kept: jax.Array
    size: jax.Array
    want: jax.Array
    span: jax.Array
    unit: jax.Array
    step: jax.Array

    @property
    def tied(self) -> jax.Array:
        """Whether the bracket is over indices."""
        low, high = halves(self.ends.key)
        return high - low <= np.ones((), low.dtype)

    @property
    def width(self) -> jax.Array:
        """How many keys or indices are left."""
        (low, high), (first, last) = map(halves, self.ends)
        last = _loops.where(high == low, last, self.size.astype(low.dtype))
        return _loops.where(self.tied, last - first, high - low)

    def answer(self) -> Cut:
        """The end that keeps what is wanted, twice.

        Units of several weights may step over that; the low end is then the answer.
        """
        met = halves(self.kept)[1] == self.want
        once = jax.tree.map(partial(_loops.where, met), *reversed(halves(self.ends)))
        return jax.tree.map(lambda x: jnp.broadcast_to(x, self.kept.shape), once)

    def unfinished(self) -> jax.Array:
        """Whether any bracket is still to be narrowed."""
        below, above = halves(self.kept)
        met = (above == self.want) | (below == self.want)
        left = (~met & (self.width > 1)).reshape(1, -1)
        return _loops.total(left.astype(jnp.float32)) > 0


class Ranks(NamedTuple):
    """Floats for a guess: what the low end keeps, what is wanted and kept beyond, of how many.

    Differences are taken before they are rounded.
    """

    below: jax.Array
    gain: jax.Array
    span: jax.Array
    size: jax.Array


def within(over: jax.Array, ends: jax.Array, guesses: jax.Array) -> jax.Array:
    """Of the three parts that two guesses make the one that holds what is wanted.

    ``over`` tells of each guess whether it keeps as much as that.
    """
    (low, high), (lower, higher), (above, beyond) = map(halves, (ends, guesses, over))
    first = _loops.where(second(ends), lower, low)
    last = _loops.where(second(ends), high, higher)
    return _loops.where(above, first, _loops.where(beyond, guesses, last))


def narrow(
    state: Brackets, guesses: Cut, over: jax.Array, counts: jax.Array, span: jax.Array
) -> Brackets:
    """That part of each bracket, of ``span`` weights."""
    return state._replace(
        ends=jax.tree.map(partial(within, over), state.ends, guesses),
        kept=within(over, state.kept, counts),
        span=span,
        step=state.step + 1,
    )


def ranks(state: Brackets) -> Ranks:
    """Of each bracket on its own."""
    below, above = halves(state.kept)
    sizes = (below, state.want - below, above - below, state.size)
    return Ranks(*(x.astype(jnp.float32) for x in sizes))


def guess(keys: Keys, state: Brackets, ranks: Ranks) -> Cut:
    """Two cuts, one to each side of where ``gain`` of the ``span`` weights in the bracket are kept.

    Zeros, often many, are told from what is above and below. Where the last pass took next to
    nothing away, many scores may be equal, and equal ones are round numbers more often than not:
    the cuts are then the first key, alone, and the roundest of the others. Brackets between round
    numbers are halved by that.
    """
    zero, one = keys.number(keys.zero), np.ones((), keys.dtype)
    (low, first), (high, _) = halves(state.ends)
    last = second(state.kept)
    tied, start = state.tied, state.step == 0
    width = state.width
    fresh = (tied & (high > low) & (first == 0)) | start
    slow, still = (~fresh & (ranks.span > state.span * np.float32(x)) for x in (0.75, 0.97))
    octaves = width >> (keys.octave + 2) > 0
    far = octaves & ~tied & ((high <= zero) | (state.step < 2))
    far = far & ~(slow & (state.step > _PATIENCE))

    extent = width.astype(jnp.float32)
    near, out = _between(keys, tied, slow, still, extent, ranks)
    beyond, margin = _beyond(keys, state, ranks)
    middle, apart = _loops.where(far, beyond, near), _loops.where(far, margin, out)
    up = last | (far & ~start & (ranks.below > 0))
    both = middle + _loops.where(up, apart, -apart)
    both = inside(both, width) + _loops.where(tied, first, low)

    holds = (low < zero) & (high > zero) & ~tied
    behind = (low == zero) & (width > one) & ~tied
    both = _loops.where(behind | (holds & ~start & last), zero + behind.astype(low.dtype), both)
    both = _loops.where(holds, jnp.minimum(both, zero), both)
    round_ = _loops.where(last, _roundest(low, _loops.minus(high, 1)), low + one)
    both = _loops.where(still & ~(tied | far | behind | holds), round_, both)
    both = lax.optimization_barrier(both)
    return lax.optimization_barrier(cuts_at(both, tied, low))


def inside(places: jax.Array, width: jax.Array) -> jax.Array:
    """Places in brackets of that width, given as floats: whole numbers between the ends.

    Where a bracket holds none it is the low end.
    """
    extent = width.astype(jnp.float32) * np.float32(1 - 2.0**-20)  # rounded, less than width
    least = _loops.where(places > 1.0, places, 1.0)  # of NaN too
    return jnp.minimum(least, extent).astype(width.dtype)


def cuts_at(places: jax.Array, tied: jax.Array, key: jax.Array) -> Cut:
    """Cuts at these keys, or at these indices of ``key`` where all scores are tied at it."""
    return Cut(_loops.where(tied, key, places), _loops.where(tied, places, 0))


def _between(
    keys: Keys,
    tied: jax.Array,
    slow: jax.Array,
    still: jax.Array,
    extent: jax.Array,
    ranks: Ranks,
) -> tuple[jax.Array, jax.Array]:
    """How many keys or indices beyond the low end the wanted cut is, and how far off that may be.

    Scores, and places of ties, are taken for uniform; the margin is part of the standard deviation
    of the wanted rank and the error of the model, which grows with the bracket. If that did not
    take much away, the next two cuts are the middle and a guess that has the wanted cut between
    them; if next to nothing, they take the thirds.
    """
    inverse = 1.0 / (ranks.span + 1.0)
    share = (ranks.gain + 0.5) * inverse
    rest = jnp.abs(jnp.minimum(share, 1.0 - share))  # more may be wanted than there is
    model = jnp.minimum(extent * np.float32(0.6 * 2.0**-keys.octave), 0.5)
    apart = _root(rest * inverse) * np.float32(0.66)
    apart = apart + _loops.where(tied, 0.0, model * rest)
    inner = share + _loops.where(share < 0.5, apart, -apart)
    share, apart = (
        _loops.where(still, third, _loops.where(slow, half, plain))
        for third, half, plain in (
            (np.float32(1 / 2), (inner + 0.5) * 0.5, share),
            (np.float32(1 / 6), jnp.abs(_loops.minus(inner, 0.5)) * 0.5, apart),
        )
    )
    return share * extent, apart * extent


def _beyond(keys: Keys, state: Brackets, ranks: Ranks) -> tuple[jax.Array, jax.Array]:
    """The same where an end is octaves away.

    Scores are taken for half-normal: the cut is so far from the low end, or where that keeps
    nothing from the deviation, give or take a margin that grows fast.
    """
    below, size = ranks.below, ranks.size
    (low, _), _ = halves(state.ends)
    zero, octave = keys.number(keys.zero), np.float32(2.0**keys.octave)
    ends = jnp.concatenate([below, below + ranks.gain]) + 0.5
    ends = lax.optimization_barrier(_beginning(ends, size))  # one kernel and not two in another
    first, wanted = halves(ends)
    one = np.float32(-np.log2(np.pi / 2) / 2)  # where the tail of one deviation begins
    known = below > 0
    base = (zero - jnp.minimum(low, zero)).astype(jnp.float32)
    mark = _loops.where(known, base, state.unit) * np.float32(1 / octave)
    target = mark + _bend(mark) + wanted - _loops.where(known, first, one)
    margin = (np.int32(1) << jnp.minimum(state.step + state.step, 24)).astype(jnp.float32)
    return base - (target - _bend(target)) * octave, margin * (octave * np.float32(1 / 16))


def _beginning(x: jax.Array, size: jax.Array) -> jax.Array:
    """Roughly log2 of where the largest x of half-normal scores begin, but for their scale.

    What a tail t begins at is, to a few percent, a square root of pi/2 r^2 / (1 + 0.9 r) with
    r = -log t.
    """
    r = jnp.maximum((_log2(size) - _log2(x)) * np.float32(np.log(2)), np.float32(2.0**-20))
    return _loops.minus(_log2(r) - _log2(r * np.float32(0.9) + 1.0) * 0.5, 127 / 2)


def _roundest(low: jax.Array, last: jax.Array) -> jax.Array:
    """The number above ``low``, up to ``last``, that most powers of two divide."""
    bits = 8 * np.dtype(low.dtype).itemsize
    shift = (bits - 1) - lax.clz(low ^ last)
    return (last >> shift) << shift


def second(pairs: jax.Array) -> np.ndarray:
    """Which entries of the first axis, of two, are the second."""
    return np.array([False, True]).reshape(2, *[1] * (pairs.ndim - 1))


def _log2(x: jax.Array) -> jax.Array:
    """Roughly 127 + log2, to a percent, from the bits of a float."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    straight = bits.astype(jnp.float32) * np.float32(2.0**-23)
    return straight + _bend(straight)


def _root(x: jax.Array) -> jax.Array:
    """Roughly the square root, to four percent, of half the bits; the true one is a kernel more."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return lax.bitcast_convert_type((bits >> 1) + np.int32(0x1FBD1DF5), jnp.float32)


def _bend(octaves: jax.Array) -> jax.Array:
    """What a logarithm is above the bits of a float, which are linear in each octave."""
    part = octaves - jnp.floor(octaves)
    return (part - part * part) * np.float32(0.344)
