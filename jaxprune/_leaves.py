"""The leaves that a search goes over: cuts of all are counted in a pass, small leaves stacked."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune import _counting, _loops, _placement, _tree
from jaxprune._brackets import Brackets, Keys
from jaxprune._counting import Cut
from jaxprune._typing import PyTree

_STACKED = 1 << 17  # copying a larger leaf costs more than the code that it saves


class Leaves:
    """One cut for each leaf; the last axis of state arrays has an entry for each, part by part.

    A part is one leaf, or small leaves of one kind and type stacked: the compiler takes as long for
    a part as for a leaf. Leaves of one kind are expected to be sharded alike.

    Args:
      leaves: scores.
      sizes: for each leaf how many weights its units hold, one number or one for each unit.
      kinds: of leaves; small ones of one kind are stacked.
      alive: masks of the weights that may be kept.
    """

    def __init__(
        self,
        leaves: Sequence[jax.Array],
        sizes: Sequence[Any] | None = None,
        kinds: Sequence[Any] | None = None,
        alive: Sequence[jax.Array] | None = None,
    ):
        self.leaves, self.sizes, self.keys = tuple(leaves), sizes, Keys.of(leaves)
        self.members = _members(leaves, kinds)
        self.order = np.concatenate(self.members)
        self.alive = alive
        if alive is not None:
            leaves = list(map(burying(), alive, leaves))
        self.parts = [jnp.stack([leaves[i] for i in members]) for members in self.members]
        lengths = [len(members) for members in self.members]
        self.firsts = list(np.cumsum([0, *lengths[:-1]], dtype=np.uint32))

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
                return [_count_at(part, cuts, i, step, on_cpu, grain) for part, i in pairs]

            found = _counting.by_backend(count, self.parts, cuts, step)
            counts = _counting.counts(lax.optimization_barrier(_counting.joined(found)))
            return counts if sizes is None else counts * jnp.stack(sizes).astype(jnp.uint32)[None]
        weighed = [
            _weigh_at(part, cuts, place, step, size, grain)
            for part, place, size in zip(self.parts, self.firsts, sizes, strict=True)
        ]
        return jnp.concatenate(weighed, 1)

    def masks(self, state: Brackets) -> list[jax.Array]:
        """What the guesses of a finished search keep, leaf by leaf.

        Of what is alive, and all of that if a score is NaN.
        """

        def keep(on_cpu, parts, cuts, step):
            pairs = zip(parts, self.firsts, strict=True)
            return [_mask_at(part, cuts, i, step, on_cpu, self.keys.grain) for part, i in pairs]

        masks, most = {}, max(map(len, self.members))
        places = lax.optimization_barrier([np.uint32(place) for place in range(most)])
        cuts = state.answer()
        if self.alive is not None:
            cuts = cuts._replace(
                key=_loops.where(self.bad, self.keys.number(self.keys.end), cuts.key)
            )
        cuts = lax.optimization_barrier(cuts)  # or the compiler finds them for every part
        kept = _counting.by_backend(keep, self.parts, cuts, state.step)
        for part, members in zip(kept, self.members, strict=True):
            for place, i in zip(places, members, strict=False):
                mask = _pick(part, place, 1)[0]
                masks[i] = mask if self.alive is None else self.alive[i] & mask
        return [masks[i] for i in range(len(self.leaves))]


@partial(jax.jit, static_argnames=("on_cpu", "grain"))
def _count_at(part, cuts, first, step, on_cpu, grain) -> _counting.Sums:
    """What entries ``first`` and following of two cuts keep of a part.

    ``first`` is a value to the compiler, so that parts of one shape share their code.
    """
    axes = tuple(range(1, part.ndim))
    sums = _counting.count(on_cpu, part, entries(cuts, first, part), step, axes, grain)
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
    kept = _counting.keep(on_cpu, part, entries(cuts, first, part), step, axes, grain)
    alone = len(part) == 1 or _counting.few(part)
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


def _members(leaves: Sequence[jax.Array], kinds: Sequence[Any] | None) -> list[list[int]]:
    """Which leaves are stacked: small ones of one kind and type."""
    found: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        alone = kinds is None or leaf.size > _STACKED
        key = i if alone else (kinds[i], jax.typeof(leaf))  # type: ignore[index]
        found.setdefault(key, []).append(i)
    return list(found.values())


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
