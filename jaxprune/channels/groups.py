"""Coupled channels, read from a jaxpr: which positions of which leaves come and go as one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, overload

import jax
import numpy as np

from jaxprune import _scopes, _tree
from jaxprune._atoms import FROZEN, LIVE, Atoms, Solution, Value
from jaxprune._scopes import Scope
from jaxprune._typing import Params


class Member(NamedTuple):
    """Where a group lives in one leaf.

    Attributes:
      path: of the leaf.
      axis: of the leaf.
      positions: int array ``(size, k)``, the k positions along the axis of each channel.
      leaf: the leaf's place among the leaves of params.
    """

    path: str
    axis: int
    positions: np.ndarray
    leaf: int


class ChannelGroup(NamedTuple):
    """Channels that are alike: each can go, with all its members, and the model still fits.

    Attributes:
      name: the path and axis of a member.
      size: number of channels.
      members: every leaf and axis that a channel has positions on.
      exact: whether removing a channel is the same as zeroing its members.
      frozen: whether its channels cannot go.
      reason: why it is frozen, or else why it is not exact.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    exact: bool
    frozen: bool
    reason: str


class Cost(NamedTuple):
    """A number of weights or operations: ``scale`` times what is left of the axes.

    ``axes`` holds the channel of every position, -1 for positions of no channel.
    """

    scale: int
    axes: tuple[np.ndarray, ...]


class Model(NamedTuple):
    """What ``channel_groups`` read: enough to read it again, and no array of the model.

    Attributes:
      paths: of the leaves of params.
      leaves: their shapes and dtypes, a flat list.
      args: the shapes and dtypes of the other arguments.
      has_state: whether apply returns updates of its variables.
      groups: every group, frozen ones last.
      offsets: the number of channels in the groups before each.
      weights: the sizes of the leaves, as costs.
      products: the operations of matmuls and convolutions, as costs.
    """

    paths: tuple[str, ...]
    leaves: tuple[jax.ShapeDtypeStruct, ...]
    args: Any
    has_state: bool
    ties: tuple[tuple[int, int], ...]
    groups: tuple[ChannelGroup, ...]
    offsets: np.ndarray
    weights: tuple[Cost, ...]
    products: tuple[Cost, ...]


class ChannelGroups(Sequence[ChannelGroup]):
    """The groups of a model, or some of them; prints as a table.

    ``groups.where(lambda g: "mlp" in g.name)`` picks groups and remembers the model.
    """

    def __init__(self, model: Model, chosen: Sequence[int]):
        """The groups of ``model`` at the places ``chosen``."""
        self.model = model
        self.chosen = tuple(chosen)

    def where(self, wanted: Callable[[ChannelGroup], bool]) -> "ChannelGroups":
        """The groups for which ``wanted`` is true."""
        return ChannelGroups(self.model, [i for i in self.chosen if wanted(self.model.groups[i])])

    @overload
    def __getitem__(self, index: int) -> ChannelGroup: ...

    @overload
    def __getitem__(self, index: slice) -> "ChannelGroups": ...

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return ChannelGroups(self.model, self.chosen[index])
        return self.model.groups[self.chosen[index]]

    def __len__(self) -> int:
        return len(self.chosen)

    def __iter__(self) -> Iterator[ChannelGroup]:
        return (self.model.groups[i] for i in self.chosen)

    def __str__(self) -> str:
        rows = [("group", "channels", "members", "")]
        for group in self:
            members = ", ".join(f"{m.path}:{m.axis}" for m in group.members[:3])
            more = f" and {len(group.members) - 3} more" if len(group.members) > 3 else ""
            flag = "frozen: " if group.frozen else "" if group.exact else "not exact: "
            rows.append((group.name, str(group.size), members + more, flag + group.reason))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            f"{name:{widths[0]}}  {size:>{widths[1]}}  {members:{widths[2]}}  {note}".rstrip()
            for name, size, members, note in rows
        ]
        return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])

    def __repr__(self) -> str:
        return str(self)


class Reading(NamedTuple):
    """A model read: its scope, the values of its leaves, its outputs' tree, what was noted."""

    scope: Scope
    leaves: list[Value]
    out_tree: Any
    atoms: Atoms


def channel_groups(
    apply: Callable[..., Any], params: Params, *args: Any, has_state: bool = False
) -> ChannelGroups:
    """The channels of a model and everything that comes and goes with each.

    A channel is a set of positions along axes of leaves that one hidden unit, filter, head or
    expert occupies: what computes it, what normalises it and what reads it. They are found in the
    equations of the model, so any framework and any layer will do. What an equation makes
    impossible to remove (the model's inputs and outputs, axes that are sorted or looked up by
    index, whatever an unknown primitive touches) is frozen, with the reason.

    Args:
      apply: ``apply(params, *args)``; only its equations are read, nothing is computed.
      params: any tree of arrays or ``jax.ShapeDtypeStruct``; batch statistics, integers and random
        keys may be among them. Leaves that are the same array are tied.
      *args: arrays or ``jax.ShapeDtypeStruct``, the other arguments.
      has_state: whether ``apply`` returns ``(y, updates)``, where updates are new values of leaves
        of params with the same path (or the end of it).

    Returns:
      A sequence of ``ChannelGroup``; print it.

    Raises:
      ValueError: if the model refuses these shapes, or params holds no array.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> params = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 4))}
      >>> apply = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
      >>> groups = jp.channel_groups(apply, params, jnp.ones((1, 2)))
      >>> [(g.name, g.size) for g in groups if not g.frozen]
      [('a:1', 3)]

    Reference:
      Fang, Ma, Song, Mi, Wang. DepGraph: Towards Any Structural Pruning, 2023.
    """
    named = [(path, leaf) for path, leaf in _tree.leaves_with_paths(params) if leaf is not None]
    if not named:
        raise ValueError("params holds no array: there is nothing to group")
    paths = tuple(path for path, _ in named)
    leaves = tuple(abstract(leaf) for _, leaf in named)
    shapes = jax.tree.map(abstract, args)
    ties = _ties([leaf for _, leaf in named])
    tree = jax.tree.structure(params)
    reading = read_model(apply, tree, leaves, shapes, paths, ties, has_state, rules=True)
    solution = reading.atoms.solve()
    groups, channel_of = _groups(paths, reading.leaves, solution)
    offsets = np.cumsum([0, *(group.size for group in groups)])
    known: dict[int, np.ndarray] = {}

    def channels(axis):
        if id(axis) not in known:
            known[id(axis)] = channel_of[solution.roots[axis]]
        return known[id(axis)]

    def cost(scale, axes):
        live = [channels(axis) for axis in axes]
        for axis, ids in zip(axes, live, strict=True):
            if not (ids >= 0).any():
                scale *= len(axis)
        return Cost(scale, tuple(ids for ids in live if (ids >= 0).any()))

    weights = tuple(cost(1, value.axes) for value in reading.leaves)
    products = tuple(cost(p.scale, p.axes) for p in reading.atoms.products)
    model = Model(paths, leaves, shapes, has_state, ties, groups, offsets, weights, products)
    return ChannelGroups(model, range(len(groups)))


def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and type of an array, of what stands for one, or of a number."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    aval = jax.typeof(leaf)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False))


def read_model(
    apply: Callable[..., Any],
    tree: Any,
    leaves: Sequence[jax.ShapeDtypeStruct],
    args: Any,
    paths: Sequence[str],
    ties: Sequence[tuple[int, int]],
    has_state: bool,
    *,
    rules: bool = False,
) -> Reading:
    """Trace a model at full size and note what its equations tie together."""
    try:
        closed, outs = jax.make_jaxpr(
            lambda flat, rest: apply(jax.tree.unflatten(tree, flat), *rest), return_shape=True
        )(list(leaves), args)
    except Exception as error:  # a framework may raise anything of its own
        shapes = ", ".join(str(leaf.shape) for leaf in jax.tree.leaves(args))
        raise ValueError(
            f"the model cannot be traced with arguments of shapes {shapes or '()'}: {error}; pass "
            "arguments as apply takes them"
        ) from error
    atoms = Atoms()
    values = []
    for i, leaf in enumerate(leaves):
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended)
        kind, zero = FROZEN if is_key else LIVE, (not is_key,) * len(leaf.shape)
        values.append(atoms.value(leaf.shape, kind, "random keys", zero=zero, source=i))
    for first, second in ties:
        _unite_all(atoms, values[first], values[second])
    given = [
        atoms.value(leaf.shape, FROZEN, "an input of the model") for leaf in jax.tree.leaves(args)
    ]
    scope, results = _scopes.read(atoms, closed, [*values, *given], rules=rules)
    _end(atoms, outs, results, dict(zip(paths, values, strict=True)), has_state)
    return Reading(scope, values, jax.tree.structure(outs), atoms)


def _end(
    atoms: Atoms, outs: Any, results: Sequence[Value], leaves: dict[str, Value], has_state: bool
) -> None:
    """Outputs freeze; updated variables are tied to what they update."""
    if has_state and not (isinstance(outs, tuple) and len(outs) == 2):
        raise ValueError("with has_state=True apply must return (y, updates)")
    reals = len(jax.tree.leaves(outs[0])) if has_state else len(results)
    for value in results[:reals]:
        for axis in value.axes:
            atoms.freeze(axis, "an output of the model")
    if not has_state:
        return
    updates = [path for path, leaf in _tree.leaves_with_paths(outs[1]) if leaf is not None]
    for path, value in zip(updates, results[reals:], strict=True):
        leaf = match_path(path, value.shape, leaves)
        if leaf is not None:
            _unite_all(atoms, value, leaves[leaf])
        else:
            for axis in value.axes:
                atoms.freeze(axis, f"an update at {path}, which is no path of params")


def match_path(path: str, shape: tuple[int, ...], leaves: Mapping[str, Any]) -> str | None:
    """The leaf of this shape at ``path``, or at the only path that ends with it."""
    fits = [p for p in leaves if p == path] or [
        p for p in leaves if p.endswith(f"/{path}") and leaves[p].shape == shape
    ]
    return fits[0] if len(fits) == 1 and leaves[fits[0]].shape == shape else None


def _unite_all(atoms: Atoms, a: Value, b: Value) -> None:
    for left, right in zip(a.axes, b.axes, strict=True):
        atoms.unite(left, right)


def _ties(leaves: Sequence[Any]) -> tuple[tuple[int, int], ...]:
    """Pairs of leaves that are one array."""
    first: dict[int, int] = {}
    ties = []
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, (jax.Array, np.ndarray)) and first.setdefault(id(leaf), i) != i:
            ties.append((first[id(leaf)], i))
    return tuple(ties)


def _groups(
    paths: Sequence[str], leaves: Sequence[Value], solution: Solution
) -> tuple[tuple[ChannelGroup, ...], np.ndarray]:
    """Groups of channels with alike members, and for every root its channel or -1.

    Channels are numbered group after group; those of frozen groups have no number.
    """
    places = [(i, a) for i, value in enumerate(leaves) for a in range(len(value.axes))]
    roots = [solution.roots[leaves[i].axes[a]] for i, a in places]
    place = np.repeat(np.arange(len(places)), [len(r) for r in roots])
    position = np.concatenate([np.arange(len(r)) for r in roots] or [np.zeros(0, int)])
    root = np.concatenate(roots or [np.zeros(0, int)])
    order = np.lexsort((position, place, root))
    root, place, position = root[order], place[order], position[order]
    starts = np.flatnonzero(np.diff(root, prepend=-1))
    ends = np.append(starts[1:], len(root))
    alike: dict[Any, list[tuple[int, int]]] = {}
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        at = root[start]
        notes = (int(solution.frozen[at]), int(solution.inexact[at]))
        alike.setdefault((notes, place[start:end].tobytes()), []).append((start, end))
    found = []
    for ((frozen, inexact), _), spans in alike.items():
        rows = np.array([position[start:end] for start, end in spans])
        where = place[slice(*spans[0])]
        order = np.argsort(rows[:, 0], kind="stable")
        rows, heads = rows[order], [int(root[spans[i][0]]) for i in order]
        members = tuple(
            Member(paths[places[p][0]], places[p][1], rows[:, where == p], places[p][0])
            for p in np.unique(where)
        )
        wide = [m for m in members if len(leaves[m.leaf].axes) > 1] or members
        name = f"{wide[0].path}:{wide[0].axis}"
        reason = solution.reasons[frozen] if frozen >= 0 else ""
        if frozen < 0 and inexact >= 0:
            reason = solution.reasons[inexact]
        found.append(
            (ChannelGroup(name, len(rows), members, inexact < 0, frozen >= 0, reason), heads)
        )
    found.sort(key=lambda pair: (pair[0].frozen, pair[0].members[0].leaf, pair[0].members[0].axis))
    channel_of = np.full(len(solution.roots), -1)
    groups: list[ChannelGroup] = []
    seen: dict[str, int] = {}
    number = 0
    for group, heads in found:
        if not group.frozen:
            channel_of[heads] = np.arange(number, number + len(heads))
        number += len(heads)
        seen[group.name] = seen.get(group.name, 0) + 1
        again = seen[group.name]
        groups.append(group._replace(name=f"{group.name}~{again}") if again > 1 else group)
    return tuple(groups), channel_of
