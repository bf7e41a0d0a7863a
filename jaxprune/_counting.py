"""One counting pass: float bits as keys, and how many scores two cuts keep of a leaf.

On a CPU what the cuts keep is written as a byte per weight and then summed as floats: a comparison
fused into its own sum does not vectorise there, and a sum of integers is compiled anew for every
leaf where one of floats is shared. Of large leaves eight strips are compared and added in half a
byte for each cut before anything is written. Accelerators compare and sum in one go.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune import _loops, _placement
from jaxprune._typing import PyTree

_EXACT = 1 << 24  # whole numbers up to here are floats
_DIGIT = 256
_FEW = 1 << 18  # over as many entries a pass takes longer than its code takes to compile
_MANY = 8  # leaves stacked: as many times more entries are few
_STRIPS = 8  # added as half bytes
_ROW = 2048  # entries of a leaf counted in one word
_WORD = 16  # bits of the word for each cut
_HALF = 4  # bits
_LINE = 512  # entries of the last axis that stay together
_STRIP = 8192  # entries in a row that a strip takes where it can: memory is read ahead in rows


class Cut(NamedTuple):
    """Kept are keys below ``key``, and of those equal to it the ones whose index is below ``end``.

    A first axis with two entries is for two cuts.
    """

    key: jax.Array
    end: jax.Array

    def both(self) -> tuple["Cut", "Cut"]:
        """The two cuts."""
        return Cut(self.key[0], self.end[0]), Cut(self.key[1], self.end[1])


class Sums(NamedTuple):
    """How many entries each of two cuts keeps, as floats: ``256 high + low``."""

    low: jax.Array
    high: jax.Array | None


def infinity(dtype: Any) -> int:
    """The key of zero, which is the bits of infinity; twice it is the key of minus infinity."""
    return 0x7FF << 52 if jnp.dtype(dtype) == jnp.uint64 else 0xFF << 23


def order(x: jax.Array, dtype: Any, grain: int = 0) -> jax.Array:
    """Unsigned keys, smaller for larger scores; both zeros are one key, NaN is the largest.

    ``grain`` bits that are zero in every score are left out.
    """
    wide = jnp.dtype(dtype) == jnp.uint64
    bits = lax.bitcast_convert_type(x.astype(jnp.float64 if wide else jnp.float32), dtype)
    last = 63 if wide else 31
    size = bits & np.asarray((1 << last) - 1, dtype)
    zero = np.asarray(infinity(dtype), dtype)
    # All ones for negative scores, so that size is added instead of subtracted. The keys of NaN
    # wrap around to the far end.
    negative = -(bits >> last)
    key = (zero + negative) - (size ^ negative)
    key = key >> grain if grain else key
    return jnp.minimum(key, np.asarray((2 * infinity(dtype) >> grain) + 1, dtype))


def kept(key: jax.Array, index: jax.Array, cut: Cut) -> jax.Array:
    """What a cut keeps of entries with these keys and places in their slices."""
    return key < cut.key + (index < cut.end).astype(key.dtype)


@partial(jax.jit, static_argnames=("axes", "grain"), inline=True)
def views(
    leaf: jax.Array, cuts: Cut, step: jax.Array, axes: tuple[int, ...], grain: int
) -> list[jax.Array]:
    """What each of two cuts keeps of a leaf, with indices along ``axes``."""
    key, index = _places(leaf, step, dtype=cuts.key.dtype, axes=axes, grain=grain)
    return [kept(key, index, cut) for cut in cuts.both()]


def few(entries: int, stacked: int = 1) -> bool:
    """Whether a pass over so many, of leaves stacked, takes less time than to compile its code."""
    return entries < _FEW * min(stacked, _MANY)


def halves(pair: PyTree) -> tuple[PyTree, PyTree]:
    """The first of two entries and the second; the axis stays, with size 1.

    Without it every sum with a pair is a reshape, which the compiler moves past one operation at a
    time, and goes over the whole program each time.
    """
    first, second = (jax.tree.map(lambda x, i=i: x[i : i + 1], pair) for i in range(2))
    return first, second


def by_backend(f: Callable[..., PyTree], *args: Any) -> PyTree:
    """``f(on_cpu, *args)``, decided when the program is lowered."""
    return lax.platform_dependent(*args, cpu=partial(f, True), default=partial(f, False))


def count(
    on_cpu: bool,
    leaf: jax.Array,
    cuts: Cut,
    step: jax.Array,
    axes: tuple[int, ...],
    grain: int,
    stacked: int = 1,
) -> Sums:
    """How many entries two cuts keep along ``axes``, which stay with size 1."""
    if not on_cpu:
        first, second = views(leaf, cuts, step, axes, grain)
        return count_bits(first, second, axes)
    if few(leaf.size, stacked):  # one sum over both, and half the code
        return Sums(*_sum(_bytes(leaf, cuts, step, axes, grain), tuple(a + 1 for a in axes)))
    return _where_tied(partial(count_bytes, axes=axes), leaf, cuts, step, axes, grain)


def keep(
    on_cpu: bool,
    leaf: jax.Array,
    cuts: Cut,
    step: jax.Array,
    axes: tuple[int, ...],
    grain: int,
    stacked: int = 1,
) -> jax.Array:
    """What two equal cuts keep; of few entries by the code that counted them."""
    if not on_cpu:
        return views(leaf, cuts, step, axes, grain)[0]
    if few(leaf.size, stacked):
        return _bytes(leaf, cuts, step, axes, grain)[0] > 0
    return _where_tied(lambda first, second: first, leaf, cuts, step, axes, grain)


def _where_tied(
    read: Callable[[jax.Array, jax.Array], PyTree],
    leaf: jax.Array,
    cuts: Cut,
    step: jax.Array,
    axes: tuple[int, ...],
    grain: int,
) -> PyTree:
    """``read`` the views of two cuts, without indices where no cut is among equal scores.

    Along an axis of millions a CPU takes longer to compare indices than for the rest of a pass.
    Under Explicit axes they are always compared: ``vmap`` of a branch selects with an unsharded
    condition, which jax refuses there.
    """

    def plain(leaf, cuts, step):
        leaf, _ = lax.optimization_barrier((leaf, step))
        key = order(leaf, cuts.key.dtype, grain)
        return read(*(key < cut.key for cut in cuts.both()))

    def tied(leaf, cuts, step):
        return read(*views(leaf, cuts, step, axes, grain))

    if _placement.explicitly_sharded(leaf):
        return tied(leaf, cuts, step)
    return lax.cond(jnp.any(cuts.end > 0), tied, plain, leaf, cuts, step)


def count_rows(leaf: jax.Array, cuts: Cut, step: jax.Array, grain: int) -> jax.Array:
    """How many entries of each row of the leaves stacked two cuts keep: ``[leaves, rows]``.

    Both counts are in one word, so that one kernel goes over a stack. ``added_up`` adds the rows of
    all of them, where two sums of each would be four kernels.
    """
    leaf, cuts = leaf.reshape(len(leaf), -1), jax.tree.map(lambda x: x.reshape(2, -1, 1), cuts)
    first, second = views(leaf, cuts, step, (1,), grain)
    both = first.astype(jnp.uint32) | (second.astype(jnp.uint32) << np.uint32(_WORD))
    both = lax.pad(both, np.uint32(0), [(0, 0, 0), (0, -both.shape[1] % _ROW, 0)])
    return jnp.sum(both.reshape(len(leaf), -1, _ROW), -1, dtype=jnp.uint32)


def added_up(parts: Sequence[jax.Array]) -> jax.Array:
    """Of rows counted the counts of two cuts, ``[2, leaves]``: one sum for leaves of as many."""
    alike: dict[int, list[int]] = {}
    for i, part in enumerate(parts):
        alike.setdefault(part.shape[1], []).append(i)
    firsts, sums, places = np.cumsum([0, *map(len, parts)]), [], []
    for members in alike.values():
        rows = jnp.concatenate([parts[i] for i in members])
        both = jnp.stack([rows & np.uint32((1 << _WORD) - 1), rows >> np.uint32(_WORD)])
        sums.append(jnp.sum(both, -1, dtype=jnp.uint32))
        places += [np.arange(firsts[i], firsts[i + 1]) for i in members]
    return jnp.concatenate(sums, 1)[:, np.argsort(np.concatenate(places))]


def count_bits(first: jax.Array, second: jax.Array, axes: tuple[int, ...]) -> Sums:
    """Sum two views, the comparisons and all."""
    return _joint(*(_sum(view, axes, whole=True) for view in (first, second)))


def count_bytes(first: jax.Array, second: jax.Array, axes: tuple[int, ...]) -> Sums:
    """Sum two views by way of half a byte per weight for each, strips of large ones added twice."""
    both = first.astype(jnp.uint8) | (second.astype(jnp.uint8) << np.uint8(_HALF))
    shape = [1 if a in axes else n for a, n in enumerate(both.shape)]
    split, most = strips(both, axes), 1
    if split is not None:  # to compare strip by strip is a tenth faster and compiles twice as long
        both, axes, most = reduce(jnp.add, split.of(both)), split.axes(axes), _STRIPS
    both = lax.optimization_barrier(both)
    found = [both & np.uint8((1 << _HALF) - 1), both >> np.uint8(_HALF)]
    again = None if split is None else strips(both, (split.axis,))
    if again is not None:
        found = lax.optimization_barrier([reduce(jnp.add, again.of(part)) for part in found])
        axes, most = again.axes(axes), _STRIPS * most
    sums = _joint(*(_sum(part, axes, most, whole=split is not None) for part in found))
    return jax.tree.map(lambda x: x.reshape(2, *shape), sums)


@partial(jax.jit, static_argnames=("axes", "grain"), inline=True)
def _bytes(
    leaf: jax.Array, cuts: Cut, step: jax.Array, axes: tuple[int, ...], grain: int
) -> jax.Array:
    """Two views as bytes, in one array."""
    places = _places(leaf, step, dtype=cuts.key.dtype, axes=axes, grain=grain)
    key, index = (jnp.broadcast_to(x, (2, *leaf.shape)) for x in places)
    return lax.optimization_barrier(kept(key, index, cuts).astype(jnp.int8))


@partial(jax.jit, static_argnames=("dtype", "axes", "grain"), inline=True)
def _places(
    leaf: jax.Array, step: jax.Array, *, dtype: Any, axes: tuple[int, ...], grain: int
) -> tuple[jax.Array, jax.Array]:
    """Keys and indices, tied to the iteration by a barrier and a zero made of ``step``.

    Without them the compiler computes both once, ahead of the loop, and holds 8 bytes per weight.
    """
    leaf, step = lax.optimization_barrier((leaf, step))
    return order(leaf, dtype, grain), indices(leaf.shape, axes, step).astype(dtype)


def counts(sums: Sums) -> jax.Array:
    """As whole numbers."""
    low, high = jax.tree.map(lambda x: x.astype(jnp.int32).astype(jnp.uint32), sums)
    return low if high is None else high * np.uint32(_DIGIT) + low


def joined(sums: Sequence[Sums]) -> Sums:
    """Of several parts, along the second axis."""
    low = jnp.concatenate([part.low for part in sums], 1)
    if all(part.high is None for part in sums):
        return Sums(low, None)
    high = [jnp.zeros_like(part.low) if part.high is None else part.high for part in sums]
    return Sums(low, jnp.concatenate(high, 1))


def _sum(
    x: jax.Array, axes: tuple[int, ...], most: int = 1, *, whole: bool = False
) -> tuple[jax.Array, jax.Array | None]:
    """Of integers up to ``most`` in size: exact sums of floats as far as these are.

    Beyond that a sum in two steps, or ``whole``, where there may be shards, as an integer: which
    takes a CPU longer, but is all that they then send.
    """
    shape = x.shape
    inner: tuple[int, ...] = ()
    for axis in sorted(axes, key=lambda a: shape[a]):
        if most * math.prod(shape[a] for a in (*inner, axis)) <= _EXACT:
            inner = (*inner, axis)
    outer = tuple(a for a in axes if a not in inner)
    sent_whole = whole and outer and jax.device_count() > 1
    if sent_whole or math.prod(shape[a] for a in outer) * _DIGIT > _EXACT:
        total = jnp.sum(x, axes, dtype=jnp.int32, keepdims=True)
        return (total & (_DIGIT - 1)).astype(jnp.float32), (total >> 8).astype(jnp.float32)
    total = jnp.sum(x.astype(jnp.float32), inner, keepdims=True)
    if not outer:
        return total, None
    high = jnp.floor(total * np.float32(1 / _DIGIT))
    low = total - high * np.float32(_DIGIT)
    return jnp.sum(low, outer, keepdims=True), jnp.sum(high, outer, keepdims=True)


def _joint(*sums: tuple[jax.Array, jax.Array | None]) -> Sums:
    low, high = zip(*sums, strict=True)
    return Sums(jnp.stack(low), None if high[0] is None else jnp.stack(high))


class Strips(NamedTuple):
    """An axis cut so that strips can be added: how many sums that leaves, and a strip's length."""

    axis: int
    sums: int
    line: int

    def of(self, x: jax.Array) -> list[jax.Array]:
        """The strips of an array, each with two axes more than it, one of size 1.

        To take that away the compiler would move one reshape past all that is done with strips, an
        operation at a time, and go over the whole program each time.
        """
        axis, sums, line = self
        split = x.reshape(*x.shape[:axis], sums, _STRIPS, line, *x.shape[axis + 1 :])
        return [lax.slice_in_dim(split, i, i + 1, axis=axis + 1) for i in range(_STRIPS)]

    def axes(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        """Axes of a strip."""
        return (*(a + 2 * (a > self.axis) for a in axes), self.axis + 1, self.axis + 2)


def strips(leaf: jax.Array, axes: tuple[int, ...]) -> Strips | None:
    """How to add up a large leaf along one of the axes, if it can be cut.

    Strips are contiguous in memory, and of one device: what may be the number of shards goes on
    dividing that of sums. Accelerators sum as fast without.
    """
    if _placement.explicitly_sharded(leaf) or few(leaf.size) or jax.default_backend() != "cpu":
        return None
    fewest = _loops.SHARDS if jax.device_count() > 1 else 1
    for axis in axes:
        last = axis == leaf.ndim - 1
        line, entries = (_LINE, 1) if last else (1, math.prod(leaf.shape[axis + 1 :]))
        shards = math.gcd(leaf.shape[axis], jax.device_count())
        sums = leaf.shape[axis] // (line * _STRIPS)
        if leaf.shape[axis] % (line * _STRIPS * shards) or sums < fewest:
            continue
        least = math.lcm(fewest, shards)
        while sums % (2 * least) == 0 and 2 * line * entries <= _STRIP:
            sums, line = sums // 2, 2 * line
        return Strips(axis, sums, line)
    return None


def indices(shape: tuple[int, ...], axes: tuple[int, ...], step: jax.Array) -> jax.Array:
    """The position of every entry within its slice along ``axes``, in that order of axes."""
    zero = jnp.broadcast_to(jnp.minimum(step, 0).astype(jnp.uint32), shape)
    terms, stride = [], 1
    for axis in reversed(axes):
        # A zero in every term, or some are computed ahead of the loop, each by code of its own.
        place = zero + lax.broadcasted_iota(jnp.uint32, shape, axis)
        terms.append(place if stride == 1 else place * np.uint32(stride))
        stride *= shape[axis]
    return reduce(jnp.add, terms, *[] if terms else [zero])


def totals(part: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Sums of positive scores along ``axes``, roughly; NaN where any score is.

    Zeros are selected: XLA on CPU may sum ``maximum(x, 0)``, or take a maximum, and lose a NaN.
    """
    wide = jnp.float64 if part.dtype == jnp.float64 else jnp.float32
    shape = [1 if a in axes else n for a, n in enumerate(part.shape)]
    zeros = _placement.full_like(part, 0)
    positive, split = lax.select(part <= zeros, zeros, part).astype(wide), strips(part, axes)
    if split is not None:  # or the sums would not be fused with what they sum
        positive = lax.optimization_barrier(reduce(jnp.add, split.of(positive)))
        axes = split.axes(axes)
    return jnp.sum(positive, axes).reshape(shape)


def totals_of(parts: Sequence[jax.Array]) -> jax.Array:
    """The same of every leaf of several parts: float32 ``[1, leaves]``."""
    # One leaf alone without its axis: a reshape would keep the compiler from seeing equal sums.
    pairs = [(part[0], 0) if len(part) == 1 else (part, 1) for part in parts]
    sums = [totals(x, tuple(range(first, x.ndim))).reshape(1, -1) for x, first in pairs]
    sums = lax.optimization_barrier([x.astype(jnp.float32) for x in sums])  # joined as they are
    joint = jnp.concatenate(sums, 1)
    return lax.optimization_barrier(joint)  # or a sum of it goes over the weights once more
