"""Brackets around cuts, narrowed by what two guesses between their ends keep."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune import _counting
from jaxprune._counting import Cut

_MAX_LEAF = 2**31 - 1
_PATIENCE = 3  # passes after which scores are not half-normal where brackets do not shrink
_GRAIN = {jnp.dtype(jnp.bfloat16): 16, jnp.dtype(jnp.float16): 13}


def _no_key(dtype: Any) -> int:
    return int(np.iinfo(dtype).max)


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
    def none(self) -> int:
        """No key: where a bracket over keys has its tie."""
        return _no_key(self.dtype)

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

    The bracket is over keys until two neighbours remain, then over the indices at ``tie``; one
    whose ends are equal is done. Where a first axis has two entries they are the low end and the
    high one, or the lower guess and the higher; arrays in pairs are half the kernels to compile.

    Attributes:
      ends: keys, or indices at ``tie``.
      kept: what they keep, uint32.
      size: how many weights there are, uint32.
      want: how many are to be kept, uint32.
      tie: the key whose indices are looked at; ``Keys.none`` as long as keys are.
      wide: whether the bracket did not shrink by half in the last pass.
      unit: the key of the standard deviation that scores would have if half-normal, by their mean.
      step: passes done.
    """

    ends: jax.Array
    kept: jax.Array
    size: jax.Array
    want: jax.Array
    tie: jax.Array
    wide: jax.Array
    unit: jax.Array
    step: jax.Array

    @property
    def tied(self) -> jax.Array:
        """Whether the bracket is over indices."""
        return self.tie != np.asarray(_no_key(self.tie.dtype), self.tie.dtype)

    def cuts(self, at: jax.Array) -> Cut:
        """Of guesses, or of the ends.

        The barrier keeps the compiler from computing them again for every leaf.
        """
        tied = self.tied[None]
        cuts = Cut(jnp.where(tied, self.tie[None], at), jnp.where(tied, at, jnp.zeros_like(at)))
        return lax.optimization_barrier(cuts)

    def unfinished(self) -> jax.Array:
        """Whether any bracket is still to be narrowed."""
        return jnp.sum((self.ends[0] != self.ends[1]).astype(jnp.float32)) > 0


class Ranks(NamedTuple):
    """Floats for a guess: what the low end keeps, what is wanted and kept beyond, of how many.

    Differences are taken before they are rounded.
    """

    below: jax.Array
    gain: jax.Array
    span: jax.Array
    size: jax.Array


Over = tuple[jax.Array, jax.Array]
"""Of two guesses, whether each keeps as much as is wanted."""


def within(over: Over, ends: jax.Array, guesses: jax.Array) -> jax.Array:
    """Of the three parts that two guesses make the one that holds what is wanted."""
    low = jnp.where(over[0], ends[0], jnp.where(over[1], guesses[0], guesses[1]))
    high = jnp.where(over[0], guesses[0], jnp.where(over[1], guesses[1], ends[1]))
    return jnp.stack([low, high])


def narrow(state: Brackets, guesses: jax.Array, over: Over, counts: jax.Array) -> Brackets:
    """That part of each bracket."""
    ends = within(over, state.ends, guesses)
    halved = ends[1] - ends[0] <= (state.ends[1] - state.ends[0]) >> 1
    kept = within(over, state.kept, counts)
    wide = ~halved & ~state.wide
    return state._replace(ends=ends, kept=kept, wide=wide, step=state.step + 1)


def settle(state: Brackets) -> Brackets:
    """Take an end that keeps what is wanted; turn to ties where two neighbouring keys remain."""
    (low, high), (below, above) = state.ends, state.kept
    met = (above == state.want) | (below == state.want)
    alone = ~met & (high - low == np.ones((), low.dtype))
    # Units of several weights may step over what is wanted; the cut below is then the answer.
    over, closed = alone & state.tied, alone & ~state.tied
    at = jnp.where(above == state.want, high, low)
    done = met | over
    ends = [
        jnp.where(closed, first, jnp.where(done, at, end))
        for first, end in ((jnp.zeros_like(low), low), (state.size.astype(low.dtype), high))
    ]
    return state._replace(ends=jnp.stack(ends), tie=jnp.where(closed, low, state.tie))


def ranks(state: Brackets) -> Ranks:
    """Of each bracket on its own."""
    below, above = state.kept
    sizes = (below, state.want - below, above - below, state.size)
    return Ranks(*(x.astype(jnp.float32) for x in sizes))


def guess(keys: Keys, state: Brackets, ranks: Ranks) -> jax.Array:
    """Two cuts, one to each side of where ``gain`` of the ``span`` weights in the bracket are kept.

    As long as an end is octaves away, scores are half-normal, give or take a margin that doubles.
    Zeros, often many, are told from what is above and below.
    """
    zero, one = keys.number(keys.zero), np.ones((), keys.dtype)
    low, width, start = state.ends[0], state.ends[1] - state.ends[0], state.step == 0
    extent = width.astype(jnp.float32)
    far = (width >> (keys.octave + 2) > 0) & (start | (state.ends[1] <= zero)) & ~state.tied
    far = far & ~(state.wide & (state.step > _PATIENCE))
    margin = (jnp.int32(1) << jnp.minimum(state.step, 12)).astype(jnp.float32)
    middle, apart = _interpolated(keys, state, ranks)
    beyond = jnp.clip(_half_normal(keys, state, ranks), 0.0, extent)
    middle = jnp.where(far, beyond, middle * extent)
    apart = jnp.where(far, margin * np.float32(2.0 ** (keys.octave - 5)), apart * extent)
    apart = jnp.minimum(apart, extent * np.float32(1 / 6))
    both = jnp.stack([middle - apart, middle + apart])
    both = jnp.clip(both, 0.0, (extent * np.float32(1 - 2.0**-20))[None]).astype(width.dtype)
    least = jnp.minimum(width, one)
    both = low[None] + jnp.clip(both, least[None], jnp.maximum(width - least, least)[None])
    behind = (low == zero) & (width > one) & ~state.tied
    both = jnp.where(behind[None], zero + one, both)
    return jnp.where(start, jnp.stack([jnp.minimum(both[0], zero), jnp.full_like(low, zero)]), both)


def _interpolated(keys: Keys, state: Brackets, ranks: Ranks) -> tuple[jax.Array, jax.Array]:
    """Where the wanted cut is in the bracket, and how far off that may be, as shares of it.

    In brackets of an octave or less scores are nearly uniform. Wider ones interpolate the log-odds
    of being kept, nearly linear in the bits of a float on both tails of the usual distributions.
    The margin is a standard deviation of the wanted rank and the error of the model, which grows
    with the bracket; if that did not halve the bracket, the next two cuts take its thirds.
    """
    below, gain, span, size = ranks
    width = state.ends[1] - state.ends[0]
    span = jnp.maximum(span, 1.0)
    share = jnp.clip(gain / span, 0.0, 1.0)
    first, wanted, last = (
        _log2(x + 0.5) - _log2(jnp.maximum(size - x, 0.0) + 0.5)
        for x in (below, below + gain, below + span)
    )
    part = (wanted - first) / jnp.maximum(last - first, np.float32(2.0**-20))
    linear = state.tied | (width >> (keys.octave - 2) == 0)
    middle = jnp.where(linear, share, jnp.clip(part, 0.0, 1.0))
    octaves = width.astype(jnp.float32) * np.float32(2.0**-keys.octave)
    model = jnp.where(state.tied, 0.0, octaves * np.float32(0.125))
    apart = jnp.sqrt(share * (1.0 - share) / span) + 0.5 / span + model
    middle = jnp.where(state.wide, np.float32(0.5), middle)
    return middle, jnp.where(state.wide, np.float32(1.0), apart)


def _half_normal(keys: Keys, state: Brackets, ranks: Ranks) -> jax.Array:
    """How far beyond the low end the wanted cut is, in keys, if scores are half-normal.

    Their scale is known from the tail at the low end; where that is empty, from the mean and the
    tail at the high end, below which scores are missing. What a tail t begins at is, to a few
    percent, a square root of pi/2 r^2 / (1 + 0.9 r) with r = -log t.
    """
    below, gain, span, size = ranks
    first, wanted, last = (
        jnp.maximum((_log2(size) - _log2(x)) * np.float32(np.log(2)), np.float32(2.0**-20))
        for x in (below, below + gain, below + span)
    )
    octave = np.float32(2.0**keys.octave)
    start, end = (_log2(r) - _log2(r * np.float32(0.9) + 1.0) * 0.5 for r in (first, wanted))
    one = np.float32(127 / 2 - np.log2(np.pi / 2) / 2)  # what these are at one deviation
    missing = jnp.square(last) / (last * np.float32(0.9) + 1.0) * np.float32(np.pi / 4 / np.log(2))
    unit = state.unit.astype(jnp.float32) - state.ends[0].astype(jnp.float32)
    return jnp.where(below > 0, start * octave, unit + (one - missing) * octave) - end * octave


def _log2(x: jax.Array) -> jax.Array:
    """Roughly log2, from the bits of a float: linear in each octave."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return bits.astype(jnp.float32) * np.float32(2.0**-23)
