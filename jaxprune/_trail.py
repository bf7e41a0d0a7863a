"""How a value inside a jaxpr derives from one leaf of the parameters, axis by axis.

Every dimension of the value is a tuple of pieces, in row-major order; a piece is a run of one leaf
axis, so transposes, reshapes, broadcasts, slices and elementwise arithmetic are bookkeeping.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.extend import core

_ELEMENTWISE = {
    "add",
    "clamp",
    "convert_element_type",
    "copy",
    "copy_p",
    "div",
    "max",
    "min",
    "mul",
    "neg",
    "optimization_barrier",
    "pcast",
    "pvary",
    "reduce_precision",
    "reshard",
    "round",
    "select_n",
    "sharding_constraint",
    "sub",
}


class Piece(NamedTuple):
    """A run along a leaf axis: entries ``stride`` apart. ``axis`` is ``None`` for a broadcast."""

    axis: int | None
    size: int
    stride: int


Dim = tuple[Piece, ...]


class Trail(NamedTuple):
    """The leaf a value derives from and its shape, what the dimensions are, and entries taken.

    ``taken`` pairs a leaf axis with the position at which a slice or a loop took one entry of it.
    """

    leaf: int
    shape: tuple[int, ...]
    dims: tuple[Dim, ...]
    taken: tuple[tuple[int, Any], ...] = ()

    def take(self, dim: int, position: Any) -> "Trail | None":
        """The trail of one entry along ``dim``, which disappears; ``None`` if it is not an axis."""
        kept = self.take_keeping(dim, position)
        return kept and kept._replace(dims=kept.dims[:dim] + kept.dims[dim + 1 :])

    def take_keeping(self, dim: int, position: Any) -> "Trail | None":
        """As ``take``, with ``dim`` left at size one."""
        pieces = self.dims[dim]
        real = [piece for piece in pieces if piece.size > 1]
        if len(real) > 1 or any(self._partial(piece) for piece in real):
            return None
        axes = [piece.axis for piece in (real or pieces) if piece.axis is not None]
        taken = self.taken + tuple((axis, position) for axis in axes)
        return self._replace(dims=(*self.dims[:dim], (), *self.dims[dim + 1 :]), taken=taken)

    def _partial(self, piece: Piece) -> bool:
        return piece.axis is not None and piece.size != self.shape[piece.axis]


def start(leaf: int, shape: Sequence[int]) -> Trail:
    """The trail of the leaf itself."""
    dims = tuple((Piece(axis, n, 1),) for axis, n in enumerate(shape))
    return Trail(leaf, tuple(shape), dims)


def follow(eqn: core.JaxprEqn, trails: Sequence[Trail | None], values: Sequence[Any]) -> list:
    """The trails of an equation's outputs; ``None`` where the leaf is lost or not the only one."""
    tagged = [i for i, trail in enumerate(trails) if trail is not None]
    lost: list[Trail | None] = [None] * len(eqn.outvars)
    name, params = eqn.primitive.name, eqn.params
    if name == "optimization_barrier":
        return list(trails)
    if len(tagged) != 1:
        return lost
    trail = trails[tagged[0]]
    assert trail is not None
    source: Any = eqn.invars[tagged[0]].aval
    result: Any = eqn.outvars[0].aval
    shape, out = source.shape, result.shape
    if name in _ELEMENTWISE:
        return [trail] if out == shape else lost
    if name == "transpose":
        return [trail._replace(dims=tuple(trail.dims[i] for i in params["permutation"]))]
    if name == "squeeze":
        gone = params["dimensions"]
        return [trail._replace(dims=tuple(d for i, d in enumerate(trail.dims) if i not in gone))]
    if name == "reshape":
        dims = None if params.get("dimensions") else reshape(trail.dims, out)
        return lost if dims is None else [trail._replace(dims=dims)]
    if name == "broadcast_in_dim" and tagged == [0]:
        return [trail._replace(dims=_broadcast(trail.dims, shape, out, params))]
    if name == "split":
        axis, sizes = params["axis"], params["sizes"]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return [_cut(trail, shape, {axis: (at, n)}) for at, n in zip(starts, sizes, strict=True)]
    if name == "slice":
        cuts = {}
        for i, (at, stop) in enumerate(
            zip(params["start_indices"], params["limit_indices"], strict=True)
        ):
            cuts[i] = (at, stop - at)
        strides = params["strides"] or (1,) * len(out)
        return lost if any(s != 1 for s in strides) else [_cut(trail, shape, cuts)]
    if name == "dynamic_slice" and tagged == [0]:
        sizes = params["slice_sizes"]
        return [_cut(trail, shape, dict(enumerate(zip(values[1:], sizes, strict=True))))]
    return lost


def reshape(dims: Sequence[Dim], shape: Sequence[int]) -> tuple[Dim, ...] | None:
    """The dimensions after a row-major reshape, or ``None`` where a run would be cut unevenly."""
    pieces = [piece for dim in dims for piece in dim][::-1]
    result: list[Dim] = []
    for size in shape:
        dim: list[Piece] = []
        left = size
        while pieces and (left > 1 or pieces[-1].size == 1):
            piece = pieces.pop()
            if left % piece.size and piece.size % left:
                return None
            if left % piece.size:
                inner = piece.size // left
                pieces.append(piece._replace(size=inner))
                piece = piece._replace(size=left, stride=piece.stride * inner)
            left //= piece.size
            dim.append(piece)
        result.append(tuple(dim))
    return tuple(result)


def size(dim: Dim) -> int:
    """The length of a dimension."""
    return math.prod(piece.size for piece in dim)


def _broadcast(dims, shape, out, params) -> tuple[Dim, ...]:
    result = [((Piece(None, n, 0),) if n > 1 else ()) for n in out]
    for i, at in enumerate(params["broadcast_dimensions"]):
        result[at] = dims[i] if shape[i] == out[at] else dims[i] + (Piece(None, out[at], 0),)
    return tuple(result)


def _cut(trail: Trail, shape: Sequence[int], cuts: dict[int, tuple[Any, int]]) -> Trail | None:
    """The trail of a block: ``cuts`` has the start and size along each dimension."""
    for dim, (at, n) in cuts.items():
        if n == shape[dim]:
            continue
        if at is None:
            return None
        if n == 1:
            taken = trail.take_keeping(dim, at)
            if taken is None:
                return None
            trail = taken
        elif len(trail.dims[dim]) != 1:
            return None
        else:
            part = (trail.dims[dim][0]._replace(size=n),)
            trail = trail._replace(dims=(*trail.dims[:dim], part, *trail.dims[dim + 1 :]))
    return trail
