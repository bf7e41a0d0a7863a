"""A physically smaller model: the channels that masks remove are gone from every array."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.extend import core

from jaxprune import _checks, _small, _tree
from jaxprune._typing import Masks, Params, PyTree
from jaxprune.channels.groups import ChannelGroups, Model, abstract, match_path, read_model
from jaxprune.channels.masks import axes_kept, channels_alive

_Kept = dict[int, dict[int, np.ndarray]]


def shrink(
    apply: Callable[..., Any], params: Params, masks: Masks, groups: ChannelGroups
) -> tuple[Callable[..., Any], Params]:
    r"""The model without the channels that ``masks`` removes: same tree, smaller arrays.

    .. math:: f'(\theta', x) = f(m \odot \theta, x)

    ``small_apply`` traces ``apply`` at full size (shapes only, no memory) whenever it is traced
    itself, and runs those equations on the small arrays, with shapes rewritten where they occur.
    No layer is touched, and functions with derivatives of their own keep them. The equality holds
    for values and gradients where every removed group is exact.

    Args:
      apply: ``apply(params, *args)``, the function that ``groups`` were read from.
      params: its full-size parameters.
      masks: bool masks of whole channels, as ``mask_channels`` makes them.
      groups: from ``channel_groups``.

    Returns:
      ``small_apply(small_params, *args)``, which takes any batch size, ``jit``, ``grad`` and
      ``vmap``, and the small parameters.

    Raises:
      ValueError: if the masks remove anything but whole channels, leave nothing between the
        model's inputs and its output, or do not fit the parameters.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> params = {"a": jnp.array([[1.0, 3.0, 2.0]]), "b": jnp.ones((3, 4))}
      >>> apply = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
      >>> groups = jp.channel_groups(apply, params, jnp.ones((1, 1)))
      >>> masks = jp.mask_channels(jp.magnitude(params), groups, 0.3)
      >>> small_apply, small = jp.shrink(apply, params, masks, groups)
      >>> small["a"].shape, small_apply(small, jnp.ones((7, 1))).shape
      ((1, 2), (7, 4))
    """
    kept = axes_kept(groups, channels_alive(masks, groups))
    model = groups.model
    _check_params(params, model)
    small = _cut_leaves(params, kept)
    tree = jax.tree.structure(params)
    small_apply = _small_apply(apply, tree, model, kept)
    _check_connected(small_apply, small, model)
    return small_apply, small


def shrink_state(
    tx: optax.GradientTransformation,
    opt_state: optax.OptState,
    params: Params,
    masks: Masks,
    groups: ChannelGroups,
) -> optax.OptState:
    """Optimizer state for the small parameters: moments, averages and masks lose the channels too.

    Args:
      tx: the optimizer that made the state.
      opt_state: its state for the full-size parameters.
      params: the full-size parameters that the optimizer trains: those of the groups, or some of
        them, matched by path or by its end (``variables["params"]`` beside batch statistics).
      masks: the masks that ``shrink`` was given.
      groups: from ``channel_groups``.

    Returns:
      A state with the structure of ``tx.init(small_params)``.

    Raises:
      ValueError: if the masks are not whole channels, the state is no state of ``tx`` for these
        parameters, or the state of a leaf cannot be matched to its weights.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxprune as jp
      >>> params = {"a": jnp.array([[1.0, 3.0, 2.0]]), "b": jnp.ones((3, 4))}
      >>> apply = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
      >>> groups = jp.channel_groups(apply, params, jnp.ones((1, 1)))
      >>> masks = jp.mask_channels(jp.magnitude(params), groups, 0.3)
      >>> tx = optax.adam(1e-3)
      >>> jp.shrink_state(tx, tx.init(params), params, masks, groups)[0].mu["a"].shape
      (1, 2)
    """
    _checks.check_optimizer(tx, "tx")
    removal = axes_kept(groups, channels_alive(masks, groups))
    trained = _trained(params, groups.model)
    kept = {at: removal[i] for at, i in enumerate(trained) if i in removal}
    small = jax.eval_shape(lambda p: _cut_leaves(p, kept), params)
    target = jax.eval_shape(tx.init, small)
    if not _alike(opt_state, target):
        raise ValueError(
            "opt_state is no state of tx for these params: their structures differ; give the "
            "params that the state was made for"
        )
    paths = [groups.model.paths[i] for i in trained]
    leaves = [groups.model.leaves[i] for i in trained]
    places = iter(range(len(paths)))
    named = jax.tree.map(lambda _: _Place(next(places)), params)

    def cut(pair, place):
        if isinstance(pair, optax.MaskedNode) or pair is None:
            return pair
        i = place.index
        axes = _matching_axes(pair.state.shape, leaves[i].shape, pair.target.shape, kept.get(i, {}))
        if axes is None:
            raise ValueError(
                f"{paths[i]}: the optimizer keeps a state of shape {pair.state.shape} for a weight "
                f"of shape {leaves[i].shape}, which cannot be cut to {pair.target.shape}; start "
                "again with tx.init(small_params)"
            )
        return _take(pair.state, axes)

    pairs = jax.tree.map(
        lambda s, t: s if s is None else _Pair(s, t), opt_state, target, is_leaf=_tree.is_none
    )
    return optax.tree.map_params(
        tx,
        cut,
        pairs,
        named,
        transform_non_params=lambda pair: pair.state if isinstance(pair, _Pair) else pair,
        is_leaf=lambda v: v is None or isinstance(v, optax.MaskedNode),
    )


def _alike(a: PyTree, b: PyTree) -> bool:
    """Whether two trees have the same structure."""
    first: Any = jax.tree.structure(a)
    return bool(first == jax.tree.structure(b))


class _Place:
    """A leaf's place, opaque to tree maps."""

    def __init__(self, index: int):
        self.index = index


class _Pair:
    """A state and what it should become, as one leaf."""

    def __init__(self, state: Any, target: Any):
        self.state, self.target = state, target


def _matching_axes(
    state: tuple[int, ...], leaf: tuple[int, ...], target: tuple[int, ...], kept: Any
) -> dict[int, np.ndarray] | None:
    """Which axes of a state to cut: those of the leaf, perhaps with one missing (Adafactor)."""
    if state == leaf:
        return kept
    for gone in range(len(leaf)) if len(state) == len(leaf) - 1 else ():
        rest = [a for a in range(len(leaf)) if a != gone]
        axes = {at: kept[a] for at, a in enumerate(rest) if a in kept}
        cut = tuple(int(axes[a].sum()) if a in axes else n for a, n in enumerate(state))
        if tuple(leaf[a] for a in rest) == state and cut == target:
            return axes
    return {} if state == target and int(np.prod(state)) <= 1 else None


def _take(leaf: Any, axes: dict[int, np.ndarray]) -> Any:
    for axis, kept in axes.items():
        if not kept.all():
            leaf = _small.take(leaf, axis, np.flatnonzero(kept))
    return leaf


def _cut_leaves(params: Params, kept: _Kept) -> Params:
    leaves, tree = jax.tree.flatten(params)
    return jax.tree.unflatten(tree, [_take(leaf, kept.get(i, {})) for i, leaf in enumerate(leaves)])


def _trained(params: Params, model: Model) -> list[int]:
    """For every leaf of ``params`` its place among the leaves of the groups."""
    known = dict(zip(model.paths, model.leaves, strict=True))
    index = {path: i for i, path in enumerate(model.paths)}
    found = []
    for path, leaf in _tree.leaves_with_paths(params):
        if leaf is None:
            continue
        match = match_path(path, np.shape(leaf), known)
        if match is None:
            raise ValueError(
                f"{path}: no leaf of the groups has this path and shape {np.shape(leaf)}; give "
                "the full-size params that the groups were read from, or a part of them"
            )
        found.append(index[match])
    return found


def _check_params(params: Params, model: Model) -> None:
    named = [(path, leaf) for path, leaf in _tree.leaves_with_paths(params) if leaf is not None]
    if [path for path, _ in named] != list(model.paths):
        odd = sorted({path for path, _ in named} ^ set(model.paths)) or ["the order of leaves"]
        raise ValueError(
            f"params are not those of the groups, first at {odd[0]}; read groups again"
        )
    for (path, leaf), known in zip(named, model.leaves, strict=True):
        if np.shape(leaf) != known.shape:
            raise ValueError(
                f"{path}: params have shape {np.shape(leaf)}, the groups were read at "
                f"{known.shape}; read groups again"
            )


def _small_apply(
    apply: Callable[..., Any], tree: Any, model: Model, kept: _Kept
) -> Callable[..., Any]:
    shapes = [
        tuple(
            int(kept[i][a].sum()) if a in kept.get(i, {}) else n for a, n in enumerate(leaf.shape)
        )
        for i, leaf in enumerate(model.leaves)
    ]

    @functools.wraps(apply)
    def small_apply(params, *args):
        leaves = jax.tree.leaves(params)
        _check_small(params, leaves, tree, model, shapes)
        full = [
            jax.ShapeDtypeStruct(known.shape, abstract(leaf).dtype, weak_type=known.weak_type)
            for known, leaf in zip(model.leaves, leaves, strict=True)
        ]
        rest = jax.tree.map(abstract, args)
        reading = read_model(apply, tree, full, rest, model.paths, model.ties, model.has_state)
        solution = reading.atoms.solve()
        gone, left = [np.zeros(0, int)], [np.zeros(0, int)]
        for i, value in enumerate(reading.leaves):
            for a, axis in enumerate(value.axes):
                alive = kept.get(i, {}).get(a)
                if alive is None:
                    left.append(axis)
                else:
                    gone.append(axis[~alive])
                    left.append(axis[alive])
        cut = _small.cut_atoms(solution, np.concatenate(gone), np.concatenate(left))
        outs = _small.run(reading.scope, cut, [*leaves, *jax.tree.leaves(args)])
        return jax.tree.unflatten(reading.out_tree, outs)

    return small_apply


def _check_small(params: Any, leaves: Any, tree: Any, model: Model, shapes: Any) -> None:
    if jax.tree.structure(params) != tree:
        raise ValueError(
            "small_apply takes the parameters that shrink returned, or a tree like them; this one "
            "has another structure"
        )
    for path, leaf, shape in zip(model.paths, leaves, shapes, strict=True):
        if np.shape(leaf) != shape:
            raise ValueError(
                f"{path}: small_apply takes shape {shape}, got {np.shape(leaf)}; pass the small "
                "parameters that shrink returned"
            )


def _check_connected(small_apply: Callable[..., Any], small: PyTree, model: Model) -> None:
    """Raise if an emptied group cuts every way from the arguments to the output."""
    leaves, tree = jax.tree.flatten(small)
    shapes = [
        jax.ShapeDtypeStruct(leaf.shape, known.dtype, weak_type=known.weak_type)
        for leaf, known in zip(leaves, model.leaves, strict=True)
    ]
    empty = [
        path
        for path, leaf, known in zip(model.paths, leaves, model.leaves, strict=True)
        if 0 in leaf.shape and 0 not in known.shape
    ]
    if not empty:
        return
    closed = jax.make_jaxpr(small_apply)(jax.tree.unflatten(tree, shapes), *model.args)
    jaxpr = closed.jaxpr
    reached = {v for v in jaxpr.invars[len(leaves) :] if 0 not in getattr(v.aval, "shape", ())}
    for eqn in jaxpr.eqns:
        if any(not isinstance(var, core.Literal) and var in reached for var in eqn.invars):
            reached |= {var for var in eqn.outvars if 0 not in getattr(var.aval, "shape", ())}
    if jaxpr.invars[len(leaves) :] and not any(var in reached for var in jaxpr.outvars):
        raise ValueError(
            f"{empty[0]}: its group is emptied and nothing of the arguments reaches the output any "
            "more; keep a channel (floor=1), only a residual branch may go whole"
        )
