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
      before: the width before the last pass.
      unit: the key of the standard deviation that scores would have if half-normal, by their mean.
      step: passes done.
    """

    ends: Cut
    kept: jax.Array
    size: jax.Array
    want: jax.Array
    before: jax.Array
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
        # The barrier, here and in a guess, keeps the compiler from finding it for every leaf.
        twice = jax.tree.map(lambda x: jnp.broadcast_to(x, self.kept.shape), once)
        return lax.optimization_barrier(twice)

    def unfinished(self) -> jax.Array:
        """Whether any bracket is still to be narrowed."""
        below, above = halves(self.kept)
        met = (above == self.want) | (below == self.want)
        return jnp.any(_loops.grid((~met & (self.width > 1)).reshape(-1)))


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


def narrow(state: Brackets, guesses: Cut, over: jax.Array, counts: jax.Array) -> Brackets:
    """That part of each bracket."""
    return state._replace(
        ends=jax.tree.map(partial(within, over), state.ends, guesses),
        kept=within(over, state.kept, counts),
        before=state.width,
        step=state.step + 1,
    )


def ranks(state: Brackets) -> Ranks:
    """Of each bracket on its own."""
    below, above = halves(state.kept)
    sizes = (below, state.want - below, above - below, state.size)
    return Ranks(*(x.astype(jnp.float32) for x in sizes))


def guess(keys: Keys, state: Brackets, ranks: Ranks) -> Cut:
    """Two cuts, one to each side of where ``gain`` of the ``span`` weights in the bracket are kept.

    Zeros, often many, are told from what is above and below.
    """
    zero, one = keys.number(keys.zero), np.ones((), keys.dtype)
    low, first = halves(state.ends)[0]
    start, tied = state.step == 0, state.tied
    width = lax.optimization_barrier(state.width)
    middle, apart = _estimate(keys, state, width, ranks)
    extent = width.astype(jnp.float32)
    apart = jnp.minimum(apart, extent * np.float32(1 / 6))
    both = middle + _loops.where(second(state.kept), apart, -apart)
    extent = extent * np.float32(1 - 2.0**-20)
    both = jnp.minimum(jnp.maximum(both, 0.0), extent).astype(width.dtype)
    least = jnp.minimum(width, one)
    both = jnp.minimum(jnp.maximum(both, least), jnp.maximum(width - least, least))
    both = both + _loops.where(tied, first, low)
    behind = (low == zero) & (width > one) & ~tied
    both = _loops.where(behind | (start & second(both)), zero + behind.astype(low.dtype), both)
    both = lax.optimization_barrier(_loops.where(start, jnp.minimum(both, zero), both))
    cuts = Cut(_loops.where(tied, low, both), _loops.where(tied, both, 0))
    return lax.optimization_barrier(cuts)


def _estimate(
    keys: Keys, state: Brackets, width: jax.Array, ranks: Ranks
) -> tuple[jax.Array, jax.Array]:
    """How many keys or indices beyond the low end the wanted cut is, and how far off that may be.

    Scores are taken for half-normal. While an end is octaves away, the cut is so far from the other
    end, give or take a margin that doubles; where that keeps nothing, the scale is known from the
    mean and the tail at the high end, below which scores are missing. Then it is between what is
    known of both ends; in brackets of less than an octave scores are nearly uniform. There the
    margin is a standard deviation of the wanted rank and the error of the model, which grows with
    the bracket. If that did not halve the bracket, the next two cuts take its thirds.
    """
    below, gain, span, size = ranks
    (low, high), (start, _) = map(halves, state.ends)
    tied, octave = state.tied, np.float32(2.0**keys.octave)
    extent = width.astype(jnp.float32)
    wide = (width > state.before >> 1) & ~(tied & (high > low) & (start == 0))

    first, wanted, last = (_beginning(x + 0.5, size) for x in (below, below + gain, below + span))
    lack = _exp2(last * 2.0 + 127) * np.float32(np.pi / 4 / np.log(2))
    unit = (state.unit.astype(jnp.float32) - low.astype(jnp.float32)) * np.float32(1 / octave)
    one = np.float32(-np.log2(np.pi / 2) / 2)  # where the tail of one deviation begins
    beyond = _loops.where(below > 0, first, unit + one - lack) - wanted
    beyond = jnp.minimum(jnp.maximum(beyond * octave, 0.0), extent)
    margin = (jnp.int32(1) << jnp.minimum(state.step, 12)).astype(jnp.float32)

    inverse = lax.optimization_barrier(1.0 / jnp.maximum(span, 1.0))
    share = _clamp(gain * inverse, 0.0, 1.0)
    rest = jnp.minimum(share, 1.0 - share) + inverse * 0.5
    part = (first - wanted) * _inverse(jnp.maximum(first - last, np.float32(2.0**-20)))
    linear = tied | (width >> (keys.octave - 2) == 0)
    part = _loops.where(linear, share, _clamp(part, 0.0, 1.0))
    model = _loops.where(tied, 0.0, extent * np.float32(0.125 / octave))
    apart = _exp2((_log2(rest) + _log2(inverse)) * 0.5) + model
    part, apart = (
        _loops.where(wide, np.float32(0.5), part),
        _loops.where(wide, np.float32(1.0), apart),
    )

    far = (width >> (keys.octave + 2) > 0) & ((state.step == 0) | (high <= keys.number(keys.zero)))
    far = far & ~tied & ~(wide & (state.step > _PATIENCE))
    middle = _loops.where(far, beyond, part * extent)
    return middle, _loops.where(far, margin * np.float32(octave / 32), apart * extent)


def _beginning(x: jax.Array, size: jax.Array) -> jax.Array:
    """Roughly log2 of where the largest x of half-normal scores begin, but for their scale.

    What a tail t begins at is, to a few percent, a square root of pi/2 r^2 / (1 + 0.9 r) with
    r = -log t.
    """
    r = jnp.maximum((_log2(size) - _log2(x)) * np.float32(np.log(2)), np.float32(2.0**-20))
    return _log2(r) - _log2(r * np.float32(0.9) + 1.0) * 0.5 - np.float32(127 / 2)


def second(pairs: jax.Array) -> np.ndarray:
    """Which entries of the first axis, of two, are the second."""
    return np.array([False, True]).reshape(2, *[1] * (pairs.ndim - 1))


def _log2(x: jax.Array) -> jax.Array:
    """Roughly 127 + log2, from the bits of a float: linear in each octave."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return bits.astype(jnp.float32) * np.float32(2.0**-23)


def _exp2(x: jax.Array) -> jax.Array:
    """Undo ``_log2``."""
    bits = (_clamp(x, 1.0, 254.0) * np.float32(2.0**23)).astype(jnp.int32)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _clamp(x: jax.Array, low: float, high: float) -> jax.Array:
    return lax.clamp(np.float32(low), x, np.float32(high))


def _inverse(x: jax.Array) -> jax.Array:
    """Roughly 1 / x; a division would get code of its own."""
    rough = _exp2(np.float32(254 - 0.07) - _log2(x))
    return rough * (2.0 - x * rough)
