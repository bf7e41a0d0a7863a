"""The leaves that a search goes over: cuts of all are counted in a pass, small leaves stacked."""

import math
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune import _counting, _loops, _placement, _tree
from jaxprune._brackets import Brackets, Keys
from jaxprune._counting import Cut
from jaxprune._typing import PyTree

_STACKED = 1 << 17  # copying a larger leaf costs more than the code that it saves
_STACKED_ON_GPU = 1 << 20  # or than the kernels, one a pass


class Leaves:
    """One cut for each leaf; the last axis of state arrays has an entry for each, part by part.

    A part is one leaf, or small leaves stacked: the compiler takes as long for a part as for a
    leaf. Those of one kind and type are stacked, which are expected to be sharded alike; on one
    device, where nothing is sharded, those of one type are, flat and padded.

    Args:
      leaves: scores.
      sizes: for each leaf how many weights its units hold, one number or one for each unit.
      kinds: of leaves; small ones of one kind are stacked.
      alive: masks of the weights that may be kept.
      shaped: whether stacked leaves must keep their shape.
    """

    def __init__(
        self,
        leaves: Sequence[jax.Array],
        sizes: Sequence[Any] | None = None,
        kinds: Sequence[Any] | None = None,
        alive: Sequence[jax.Array] | None = None,
        *,
        shaped: bool = False,
    ):
        self.leaves, self.sizes, self.keys = tuple(leaves), sizes, Keys.of(leaves)
        self.stacks = _stacks(leaves, kinds, shaped=shaped)
        self.order = np.concatenate([stack.members for stack in self.stacks])
        self.alive = alive
        if alive is not None:
            leaves = list(map(burying(), alive, leaves))
        self.parts = [stack.of(leaves) for stack in self.stacks]
        lengths = [len(stack.members) for stack in self.stacks]
        self.firsts = list(np.cumsum([0, *lengths[:-1]], dtype=np.uint32))

    def by_part(self, x: Any) -> Any:
        """An array with an entry for each leaf along its last axis, in the order of parts."""
        return x if _in_order(self.order) else x[..., self.order]

    def by_leaf(self, x: jax.Array) -> jax.Array:
        """The same in the order of leaves."""
        return x if _in_order(self.order) else x[..., np.argsort(self.order)]

    def zeros(self) -> Any:
        """For the two cuts of every leaf, known to the compiler."""
        return np.zeros((2, len(self.leaves)), np.uint32)

    def whole(self) -> Any:
        """How many weights each leaf holds."""
        if self.sizes is None:
            return np.array([[self.leaves[i].size for i in self.order]], np.uint32)
        pairs = zip(self.leaves, self.sizes, strict=True)
        weights = [_weighed(jnp.ones(u.shape, bool), n, tuple(range(u.ndim))) for u, n in pairs]
        return jnp.stack(weights)[None]

    @cached_property
    def totals(self) -> jax.Array:
        """Roughly the sum of the positive scores of each leaf, once for every weight."""
        parts = self.parts
        if self.sizes is not None:
            parts = [
                part * jnp.broadcast_to(jnp.asarray(size).astype(part.dtype), part.shape)
                for part, size in zip(parts, self.sizes, strict=True)
            ]
        return _counting.totals_of(parts)

    @cached_property
    def bad(self) -> jax.Array:
        """Whether a score is NaN, of those alive."""
        return lax.optimization_barrier(jnp.isnan(_loops.total(self.totals)))

    def tally(self, cuts: Cut, step: jax.Array) -> jax.Array:
        """How many weights each of two cuts keeps."""
        grain, sizes = self.keys.grain, self.sizes
        if sizes is None or not any(np.ndim(size) for size in sizes):

            def count(on_cpu, parts, cuts, step):
                pairs = zip(parts, self.firsts, strict=True)
                if not on_cpu and all(map(_placement.on_one_gpu, parts)):
                    return _counting.added_up([_rows_at(*p, cuts, step, grain) for p in pairs])
                found = [_count_at(*p, cuts, step, on_cpu, grain) for p in pairs]
                return _counting.counts(lax.optimization_barrier(_counting.joined(found)))

            counts = _counting.by_backend(count, self.parts, cuts, step) - self._padding(cuts)
            return counts if sizes is None else counts * jnp.stack(sizes).astype(jnp.uint32)[None]
        weighed = [
            _weigh_at(part, cuts, place, step, size, grain)
            for part, place, size in zip(self.parts, self.firsts, sizes, strict=True)
        ]
        return jnp.concatenate(weighed, 1)

    def _padding(self, cuts: Cut) -> Any:
        """How many entries are kept that are none: all or none, behind every index of a leaf."""
        padding = np.array([[n for x in self.stacks for n in x.padding(self.leaves)]], np.uint32)
        if not padding.any():
            return np.uint32(0)
        infinite = self.keys.number(2 * self.keys.zero)  # the key of minus infinity
        every = np.repeat(padding, 2, 0)  # not broadcast, which is code ahead of the loop
        return _loops.where(cuts.key > infinite, every, np.uint32(0))

    def masks(self, state: Brackets) -> list[jax.Array]:
        """What the guesses of a finished search keep, leaf by leaf.

        Of what is alive, and all of that if a score is NaN.
        """

        def keep(on_cpu, parts, cuts, step):
            pairs = zip(parts, self.firsts, strict=True)
            return [_mask_at(part, cuts, i, step, on_cpu, self.keys.grain) for part, i in pairs]

        masks, most = {}, max(len(stack.members) for stack in self.stacks)
        places = lax.optimization_barrier([np.uint32(place) for place in range(most)])
        cuts = state.answer()
        if self.alive is not None:
            cuts = cuts._replace(
                key=_loops.where(self.bad, self.keys.number(self.keys.end), cuts.key)
            )
        cuts = lax.optimization_barrier(cuts)  # or the compiler finds them for every part
        kept = _counting.by_backend(keep, self.parts, cuts, state.step)
        for part, stack in zip(kept, self.stacks, strict=True):
            for place, i in zip(places, stack.members, strict=False):
                mask = stack.entry(part, place, self.leaves[i].shape)
                masks[i] = mask if self.alive is None else self.alive[i] & mask
        return [masks[i] for i in range(len(self.leaves))]


@partial(jax.jit, static_argnames="grain")
def _rows_at(part, first, cuts, step, grain) -> jax.Array:
    return _counting.count_rows(part, entries(cuts, first, part), step, grain)


@partial(jax.jit, static_argnames=("on_cpu", "grain"))
def _count_at(part, first, cuts, step, on_cpu, grain) -> _counting.Sums:
    """What entries ``first`` and following of two cuts keep of a part.

    ``first`` is a value to the compiler, so that parts of one shape share their code.
    """
    axes = tuple(range(1, part.ndim))
    cuts = entries(cuts, first, part)
    sums = _counting.count(on_cpu, part, cuts, step, axes, grain, len(part))
    return jax.tree.map(lambda x: x.reshape(2, len(part)), sums)


@partial(jax.jit, static_argnames="grain")
def _weigh_at(part, cuts, first, step, size, grain) -> jax.Array:
    """The same in weights, of a part of units that hold ``size`` of them."""
    axes = tuple(range(1, part.ndim))
    views = _counting.views(part, entries(cuts, first, part), step, axes, grain)
    return jnp.stack([_weighed(view, size, axes) for view in views])


@partial(jax.jit, static_argnames=("on_cpu", "grain"))
def _mask_at(part, cuts, first, step, on_cpu, grain) -> jax.Array:
    axes = tuple(range(1, part.ndim))
    cuts = entries(cuts, first, part)
    kept = _counting.keep(on_cpu, part, cuts, step, axes, grain, len(part))
    alone = len(part) == 1 or _counting.few(part.size, len(part))
    return kept if alone else lax.optimization_barrier(kept)


def entries(cuts: Cut, first: jax.Array, part: jax.Array) -> Cut:
    shape = (2, len(part), *[1] * (part.ndim - 1))
    picked = _pick(cuts, lax.optimization_barrier(first), len(part), axis=1)
    return jax.tree.map(lambda x: x.reshape(shape), picked)


def _weighed(view: jax.Array, size: Any, axes: tuple[int, ...]) -> jax.Array:
    size = jnp.asarray(size).astype(jnp.uint32)
    weights = view.astype(jnp.uint32) * jnp.broadcast_to(size, view.shape)
    return jnp.sum(weights, axes, dtype=jnp.uint32)


def _pick(tree: PyTree, first: Any, size: int, axis: int = 0) -> PyTree:
    """Entries ``first`` and following of an axis; where ``first`` is a value, code is shared."""
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, first, size, axis), tree)


class _Stack(NamedTuple):
    """Leaves stacked, flat and padded with minus infinity to a ``length`` where there is one."""

    members: list[int]
    length: int | None = None

    def of(self, leaves: Sequence[jax.Array]) -> jax.Array:
        """The part."""
        if self.length is None:
            return jnp.stack([leaves[i] for i in self.members])
        rows = [leaves[i].reshape(1, -1) for i in self.members]
        dtype, least = rows[0].dtype, np.array(-np.inf, rows[0].dtype)
        half = dtype.itemsize == 2
        if half:  # as bits: a kernel that selects half floats may flush subnormals
            rows = [lax.bitcast_convert_type(row, jnp.uint16) for row in rows]
            least = least.view(np.uint16)
        rows = [lax.pad(x, least, [(0, 0, 0), (0, self.length - x.size, 0)]) for x in rows]
        part = jnp.concatenate(rows)
        return lax.bitcast_convert_type(part, dtype) if half else part

    def padding(self, leaves: Sequence[jax.Array]) -> list[int]:
        """How many entries each leaf is padded with."""
        return [0 if self.length is None else self.length - leaves[i].size for i in self.members]

    def entry(self, part: jax.Array, place: Any, shape: tuple[int, ...]) -> jax.Array:
        """The leaf of that shape at a place."""
        sizes = shape if self.length is None else (math.prod(shape),)
        first = place, *[np.uint32(0)] * len(sizes)
        leaf = lax.dynamic_slice(part, first, (1, *sizes))
        return lax.squeeze(leaf, (0,)) if self.length is None else leaf.reshape(shape)


def _stacks(
    leaves: Sequence[jax.Array], kinds: Sequence[Any] | None, *, shaped: bool
) -> list[_Stack]:
    """Which leaves are stacked: small ones. Types of a byte may have no infinity to pad with."""
    as_they_are: dict[Any, list[int]] = {}
    flat: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        on_gpu = _placement.on_one_gpu(leaf) and not shaped
        most = _STACKED_ON_GPU if on_gpu else _STACKED
        if kinds is None or leaf.size > most:
            as_they_are[i] = [i]
        elif shaped or not _placement.on_one_device(leaf) or leaf.dtype.itemsize < 2:
            as_they_are.setdefault((kinds[i], jax.typeof(leaf)), []).append(i)
        else:
            flat.setdefault(leaf.dtype, []).append(i)
    padded = [stack for members in flat.values() for stack in _padded(members, leaves)]
    for stack in padded:
        stack.members.sort()
    return [*map(_Stack, as_they_are.values()), *padded]


def _padded(members: Sequence[int], leaves: Sequence[jax.Array]) -> list[_Stack]:
    """Leaves in stacks: of one size, or padded, to no more than four times, while all are few."""
    stacks: list[_Stack] = []
    longest = 0
    for i in sorted(members, key=lambda i: -leaves[i].size):
        size, many = leaves[i].size, len(stacks[-1].members) + 1 if stacks else 1
        joins = _counting.few(many * longest, many if 4 * size >= longest else 1)
        if stacks and (size == longest or joins):
            stacks[-1].members.append(i)
        else:
            stacks.append(_Stack([i], size))
            longest = size
    return stacks


def _in_order(order: np.ndarray) -> bool:
    return bool(np.all(order == np.arange(len(order))))


def burying() -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A function of a mask and scores: those of weights already pruned come last.

    So exact counts stay exact. The constants are one for all leaves of a type.
    """
    least = _placement.filling(lambda dtype: jnp.finfo(dtype).min)
    below = _placement.filling(lambda _: -jnp.inf)

    def bury(mask, score):
        # Selected, since a maximum would flush subnormals.
        finite = lax.select(score == below(score), least(score), score)
        return lax.select(mask, finite, below(score))

    return bury


def any_nan(scores: PyTree) -> jax.Array:
    """Whether any score is NaN."""
    leaves = jax.tree.leaves(scores)
    if not leaves:
        return jnp.zeros((), bool)
    return Leaves(leaves, kinds=_tree.kinds(scores)).bad
