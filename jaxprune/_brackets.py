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

    def power(self, exponent: int) -> int:
        """The key of a power of two."""
        mantissa, bias = (52, 1023) if self.dtype == jnp.uint64 else (23, 127)
        return self.zero - (((exponent + bias) << mantissa) >> self.grain)


class Brackets(NamedTuple):
    """A bracket per cut: ``low`` keeps ``below`` < ``want``, ``high`` keeps ``above`` >= ``want``.

    The bracket is over keys until two neighbours remain, then over the indices at ``tie``.
    ``guesses`` are two cuts between, and in the end the cut that was looked for, twice. ``wide``
    brackets did not shrink by half in the last pass.
    """

    low: jax.Array
    high: jax.Array
    below: jax.Array
    above: jax.Array
    size: jax.Array
    want: jax.Array
    tie: jax.Array
    tied: jax.Array
    wide: jax.Array
    done: jax.Array
    guesses: jax.Array
    step: jax.Array

    def cut(self, which: int) -> Cut:
        """One of the two guesses.

        The barrier keeps the compiler from computing it again for every leaf.
        """
        at, none = self.guesses[which], np.asarray(np.iinfo(self.tie.dtype).max, self.tie.dtype)
        cut = Cut(
            key=jnp.where(self.tied, self.tie, at),
            end=jnp.where(self.tied, at, jnp.zeros_like(at)),
            tie=jnp.where(self.tied, self.tie, none),
        )
        return lax.optimization_barrier(cut)


class Ranks(NamedTuple):
    """Floats for a guess: what ``low`` keeps, what is wanted and what is kept beyond, of how many.

    Differences are taken before they are rounded.
    """

    below: jax.Array
    gain: jax.Array
    span: jax.Array
    size: jax.Array


def move(state: Brackets, counts: jax.Array) -> Brackets:
    """Of each bracket the part that holds what is wanted."""
    reached = counts >= state.want[None]
    inside = reached[1] & ~reached[0]
    moved = state._replace(
        low=jnp.where(inside, state.guesses[0], state.guesses[1]),
        below=jnp.where(inside, counts[0], counts[1]),
        high=jnp.where(inside, state.guesses[1], state.high),
        above=jnp.where(inside, counts[1], state.above),
    )
    moved = choose(reached[0], state._replace(high=state.guesses[0], above=counts[0]), moved)
    halved = moved.high - moved.low <= (state.high - state.low) >> 1
    moved = settle(moved._replace(wide=~halved & ~state.wide))
    return choose(state.done, state, moved)


def settle(state: Brackets) -> Brackets:
    """Take an end that keeps what is wanted; turn to ties where two neighbouring keys remain."""
    one = jnp.ones_like(state.low)
    met = (state.above == state.want) | (state.below == state.want)
    at = jnp.where(state.above == state.want, state.high, state.low)
    closed = ~met & (state.high - state.low == one)
    # Units of several weights may step over what is wanted; the cut below is then the answer.
    over, closed = closed & state.tied, closed & ~state.tied
    return state._replace(
        done=met | over,
        guesses=jnp.where((met | over)[None], at[None], state.guesses),
        tied=state.tied | closed,
        tie=jnp.where(closed, state.low, state.tie),
        low=jnp.where(closed, jnp.zeros_like(one), state.low),
        high=jnp.where(closed, state.size.astype(one.dtype), state.high),
    )


def choose(condition: jax.Array, a: Brackets, b: Brackets) -> Brackets:
    """Bracket by bracket; the step is that of ``a``."""

    def pick(x, y):
        return jnp.where(jnp.broadcast_to(condition, x.shape), x, y)

    return jax.tree.map(pick, a._replace(step=a.done), b._replace(step=b.done))._replace(
        step=a.step
    )


def ranks(state: Brackets) -> Ranks:
    """Of each bracket on its own."""
    gain, span = (x - state.below for x in (state.want, state.above))
    return Ranks(*(x.astype(jnp.float32) for x in (state.below, gain, span, state.size)))


def renew(keys: Keys, state: Brackets, ranks: Ranks) -> Brackets:
    """Two new guesses in each bracket that is not done.

    The second pair tells zeros, often many, from what is above and below.
    """
    zero, one = keys.number(keys.zero), np.ones((), keys.dtype)
    probe = (state.step == 0) & (state.low < zero) & (state.high > zero + one) & ~state.tied
    zeros = jnp.stack([jnp.full_like(state.low, zero), jnp.full_like(state.low, zero + one)])
    guesses = jnp.where(probe[None], zeros, _guess(state, ranks))
    return state._replace(
        guesses=jnp.where(state.done[None], state.guesses, guesses), step=state.step + 1
    )


def _guess(state: Brackets, ranks: Ranks) -> jax.Array:
    """Two cuts, one to each side of where ``gain`` of the ``span`` weights in the bracket are kept.

    In brackets of an octave or less scores are nearly uniform. Wider ones interpolate the log-odds
    of being kept, nearly linear in the bits of a float on both tails of the usual distributions.
    The two cuts are apart by a standard deviation of the wanted rank and by the error of the model,
    which grows with the bracket; if that did not halve the bracket, the next two take its thirds.
    """
    below, gain, span, size = ranks
    width = state.high - state.low
    octave, narrow = (2.0**52, 50) if width.dtype == jnp.uint64 else (2.0**23, 21)
    span = jnp.maximum(span, 1.0)
    share = jnp.clip(gain / span, 0.0, 1.0)
    start, wanted, end = (
        _log2(x + 0.5) - _log2(jnp.maximum(size - x, 0.0) + 0.5)
        for x in (below, below + gain, below + span)
    )
    part = (wanted - start) / jnp.maximum(end - start, np.float32(2.0**-20))
    linear = state.tied | (width >> narrow == 0)
    middle = jnp.where(linear, share, jnp.clip(part, 0.0, 1.0))
    third = np.float32(1 / 6)
    extent = width.astype(jnp.float32)
    model = jnp.where(state.tied, 0.0, extent * np.float32(0.125 / octave))
    apart = jnp.sqrt(share * (1.0 - share) / span) + 0.5 / span + model
    middle = jnp.where(state.wide, np.float32(0.5), middle)
    apart = jnp.where(state.wide, third, jnp.minimum(apart, third))
    both = jnp.clip(jnp.stack([middle - apart, middle + apart]), 0.0, np.float32(1 - 2.0**-20))
    one = jnp.ones_like(width)
    last = jnp.maximum(width, one + one) - one
    leap = (both * extent[None]).astype(width.dtype)
    return state.low[None] + jnp.clip(leap, one[None], last[None])


def _log2(x: jax.Array) -> jax.Array:
    """Roughly log2, from the bits of a float: linear in each octave."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return bits.astype(jnp.float32) * np.float32(2.0**-23)
