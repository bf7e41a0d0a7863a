"""Trees whose ungoverned leaves are ``None``: selection by path, None-aware maps, checks.

``None`` is a leaf here and an empty subtree everywhere else in JAX; only this module knows.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _checks
from jaxprune._typing import Params, Prunable, PyTree

_NNX_VALUES = ("value", "raw_value")
_NOT_KERNELS = {"bias", "scale", "offset", "mean", "var"}
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_NUMBER = re.compile(r"\d+")
_POSITION = re.compile(r"pos(itions?|itional)?|pos_?emb\w*")


def is_none(value: Any) -> bool:
    """Whether ``value`` is ``None``; pass it as ``is_leaf`` to see ungoverned leaves."""
    return value is None


def path_str(path: Any) -> str:
    """A key path as "a/b/kernel", without the trailing ``value`` that NNX adds."""
    if isinstance(path, str):
        return path
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    if len(names) > 1 and names[-1].strip(".") in _NNX_VALUES:
        names.pop()
    return "/".join(name.strip(".") for name in names)


def structure(tree: PyTree) -> Any:
    """The structure of ``tree`` with ``None`` as a leaf."""
    return jax.tree.structure(tree, is_leaf=is_none)


def leaves_with_paths(tree: PyTree) -> list[tuple[str, Any]]:
    """The leaves of ``tree``, ``None`` among them, each with its path."""
    pairs = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_none)[0]
    return [(path_str(path), leaf) for path, leaf in pairs]


def unflatten(tree: PyTree, leaves: Iterable[Any]) -> PyTree:
    """A tree like ``tree`` with these leaves."""
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def map_governed(f: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """Map ``f`` over the leaves that no tree has as ``None``; the others become ``None``."""

    def call(*leaves):
        return None if any(leaf is None for leaf in leaves) else f(*leaves)

    return jax.tree.map(call, tree, *rest, is_leaf=is_none)


def map_governed_with_path(f: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """``map_governed`` with the leaf's path as the first argument of ``f``."""

    def call(path, *leaves):
        return None if any(leaf is None for leaf in leaves) else f(path_str(path), *leaves)

    return jax.tree_util.tree_map_with_path(call, tree, *rest, is_leaf=is_none)


def kinds(tree: PyTree) -> tuple[str, ...]:
    """For every leaf its path with layers' numbers left out: the same for the like of all layers.

    Numbers in the last two names stay: modules ``linear_1`` and ``linear_2`` of one layer are often
    sharded in different ways.
    """

    def kind(path):
        names = path.split("/")
        return "/".join([_NUMBER.sub("#", "/".join(names[:-2])), *names[-2:]])

    return tuple(kind(path) for path, leaf in leaves_with_paths(tree) if leaf is not None)


def kernels(path: Any, leaf: Any) -> bool:
    """Whether a leaf looks like the weight of a matmul or convolution: the default ``prunable``.

    True for floating leaves with two or more axes, unless the leaf is named a bias, scale, offset,
    mean or var, or a component of its path names an embedding or a position. For certainty,
    ask the model itself with ``jp.matmul_weights``.

    Args:
      path: the leaf's path, "a/b/kernel" or a JAX key path.
      leaf: an array or ``jax.ShapeDtypeStruct``.

    Returns:
      A bool.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.kernels("dense/kernel", jnp.ones((2, 3))), jp.kernels("dense/bias", jnp.ones((2, 3)))
      (True, False)
    """
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating) or len(leaf.shape) < 2:
        return False
    parts = path_str(path).split("/")
    if any(_names_embedding(part) for part in parts):
        return False
    words = _words(parts[-1])
    return not words or (words[-1] not in _NOT_KERNELS and words[0] != "bias")


def matching(pattern: str) -> Prunable:
    """A ``prunable`` predicate: floating leaves whose path matches a regular expression anywhere.

    Args:
      pattern: searched (``re.search``) in paths such as "encoder/dense_0/kernel".

    Returns:
      ``prunable(path, leaf) -> bool``.

    Raises:
      ValueError: for what is no regular expression; from whatever uses the predicate, when it
        selects no leaf.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.select({"a": jnp.ones(2), "b": jnp.ones(2)}, jp.matching("^a$"))["b"] is None
      True
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"pattern is {pattern!r}, which is no regular expression: {error}; it is searched "
            "anywhere in a path, so a name alone will do"
        ) from error

    def prunable(path: Any, leaf: Any) -> bool:
        del leaf
        return compiled.search(path_str(path)) is not None

    prunable.__name__ = f"matching({pattern!r})"
    return prunable


def select(params: Params, prunable: Prunable = kernels) -> Params:
    """Keep the governed leaves of ``params``; the others become ``None``.

    Args:
      params: any tree of arrays.
      prunable: ``prunable(path, leaf) -> bool``.

    Returns:
      A tree of the same structure.

    Raises:
      ValueError: if no leaf is selected (the message lists the paths), or a selected leaf is empty.
      TypeError: if a selected leaf is not a floating array.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.select({"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)})["bias"] is None
      True
    """
    _checks.check_steps(prunable=prunable)

    def pick(path, leaf):
        name = path_str(path)
        if leaf is None or not prunable(name, leaf):
            return None
        check_prunable(name, leaf)
        return leaf

    selected = jax.tree_util.tree_map_with_path(pick, params, is_leaf=is_none)
    if jax.tree.leaves(params) and not jax.tree.leaves(selected):
        name = getattr(prunable, "__name__", repr(prunable))
        seen = ", ".join(path for path, leaf in leaves_with_paths(params) if leaf is not None)
        raise ValueError(
            f"nothing to prune: {name} selects none of the leaves {seen}; "
            "pass prunable=jp.matching(...) or another predicate that selects a floating leaf"
        )
    return selected


def check_prunable(path: str, leaf: Any) -> None:
    """Raise unless ``leaf`` is a non-empty array of real floating numbers."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{path}: selected for pruning, but its type is {dtype or type(leaf).__name__}; "
            "only real floating arrays can be pruned, so make prunable skip it"
        )
    if np.prod(leaf.shape) == 0:
        raise ValueError(
            f"{path}: selected for pruning, but it is empty, shape {leaf.shape}; "
            "make prunable skip it"
        )


def check_like(what: str, tree: PyTree, params: Params, *, allow_extra: bool = False) -> None:
    """Raise a ``ValueError`` with a path unless ``tree`` fits ``params`` (``None`` fits anything).

    ``allow_extra`` lets ``tree`` have leaves where ``params`` has ``None``.
    """
    if structure(tree) != structure(params):
        ours, theirs = dict(leaves_with_paths(params)), dict(leaves_with_paths(tree))
        odd = sorted(ours.keys() ^ theirs.keys()) or sorted(ours)
        raise ValueError(
            f"{what} and params have different trees, first at {odd[0] if odd else 'the root'}; "
            f"build {what} from these params, with None at the leaves that are not governed"
        )
    pairs = zip(leaves_with_paths(params), leaves_with_paths(tree), strict=True)
    for (path, ours), (_, theirs) in pairs:
        if theirs is None or (ours is None and allow_extra):
            continue
        if ours is None:
            raise ValueError(f"{path}: {what} has a leaf where params has None; use None there")
        if jnp.shape(theirs) != jnp.shape(ours):
            raise ValueError(
                f"{path}: {what} has shape {jnp.shape(theirs)}, params {jnp.shape(ours)}; "
                f"build {what} from these params"
            )


def check_masks(masks: PyTree, params: Params) -> None:
    """Raise unless ``masks`` fits ``params`` and holds bools."""
    ours, theirs = map(are_bools, (params, masks))
    if ours and all(ours) and not all(theirs):
        raise TypeError("params holds the bools, masks does not; they come as (params, masks)")
    check_like("masks", masks, params)
    check_bools(masks)


def are_bools(tree: PyTree) -> list[bool]:
    """Which leaves are arrays of bools."""
    return [getattr(leaf, "dtype", None) == jnp.bool_ for leaf in jax.tree.leaves(tree)]


def check_bools(masks: PyTree) -> None:
    """Raise a ``TypeError`` unless every mask is one of bools."""
    for path, mask in leaves_with_paths(masks):
        if mask is not None and jnp.asarray(mask).dtype != jnp.bool_:
            raise TypeError(
                f"{path}: the mask has type {jnp.asarray(mask).dtype}; masks are bool, True where "
                "kept: jp.get_masks(state, params), jp.unpack_masks of packed ones, or mask != 0"
            )


def widen(x: jax.Array) -> jax.Array:
    """``x`` in float32, or in its own type if that is as wide."""
    return x if x.dtype.itemsize >= 4 else x.astype(jnp.float32)


def _names_embedding(part: str) -> bool:
    """Whether a path component names an embedding or position ("transpose", "ensemble" do not)."""
    lower = [word.lower() for word in _WORD.findall(part)]
    return "embed" in part.lower() or any(
        word in ("wte", "wpe") or word.startswith("emb") or _POSITION.fullmatch(word)
        for word in lower
    )


def _words(name: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(name)]
