"""Scores and counts become masks; masks are applied, measured and packed."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune import _checks, _exact, _leaves, _loops, _placement, _sums, _topk, _tree, allocation
from jaxprune._typing import Allocation, Counts, Masking, Masks, Params, PyTree, Scores


def mask_topk(scores: Scores, keep: Counts, *, axis: Any = None) -> Masks:
    r"""Keep the ``keep`` largest scores of each leaf; ties go to the lower flat index.

    .. math:: m_j = [\, \operatorname{rank}(s_j) < k \,]

    Args:
      scores: a tree of floating arrays, ``None`` where not governed. NaN ranks last.
      keep: int32 scalars like ``scores``, as an allocation gives them.
      axis: rank within each slice along this axis: an int, a tuple (one slice spans them all, in
        that order), or a tree of these like ``scores``, such as ``jp.fan_in_axes`` gives. The count
        is shared out evenly, one more for the first slices where it does not divide.

    Returns:
      Bool masks like ``scores``.

    Raises:
      ValueError: if ``keep`` does not fit the scores, or an axis does not exist.
      TypeError: if a score is not floating.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.mask_topk({"w": jnp.array([3.0, 1.0, 3.0])}, {"w": 2})["w"].tolist()
      [True, False, True]
    """
    check_scores(scores, keep)
    if axis is not None:
        return _tree.map_governed_with_path(_topk_along, scores, keep, axis_tree(scores, axis))
    return _tree.unflatten(scores, _best(scores, jax.tree.leaves(_like(scores, keep))).masks)


def mask_threshold(scores: Scores, threshold: Any, *, axes: Any = None) -> Masks:
    r"""Keep scores above a threshold.

    .. math:: m_j = [\, s_j > \theta \,]

    Args:
      scores: a tree of floating arrays, ``None`` where not governed.
      threshold: a number or scalar, compared in float32 or wider.
      axes: remove whole slices: scores are summed over these axes (an int or tuple, or a tree of
        these) and every entry of a slice shares the verdict on its sum.

    Returns:
      Bool masks like ``scores``.

    Raises:
      ValueError: if the threshold is NaN or an axis does not exist.
      TypeError: if a score is not floating.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> w = jnp.array([[0.1, 0.5, 0.2], [0.3, 0.4, 0.0], [0.0, 0.6, 0.1]])
      >>> jp.mask_threshold({"w": w}, 0.3)["w"].astype(int).tolist()
      [[0, 1, 0], [0, 1, 0], [0, 1, 0]]

    Reference:
      Han, Pool, Tran, Dally. Learning both Weights and Connections for Efficient Neural Networks,
      2015.
    """
    if _checks.is_concrete(threshold) and np.isnan(float(threshold)):
        raise ValueError("threshold is NaN; give a number")
    check_scores(scores)

    def above(path, leaf, over):
        wide = _tree.widen(leaf)
        if over is not None:
            wide = _sums.reproducible_sum(wide, resolve_axes(path, leaf, over))
        return jnp.broadcast_to(wide > jnp.asarray(threshold).astype(wide.dtype), leaf.shape)

    if axes is None:
        return _tree.map_governed_with_path(lambda path, leaf: above(path, leaf, None), scores)
    return _tree.map_governed_with_path(above, scores, axis_tree(scores, axes))


def apply_masks(params: Params, masks: Masks) -> Params:
    r"""Zero the pruned weights.

    .. math:: w \leftarrow m \odot w

    Args:
      params: a tree of arrays.
      masks: bool masks like ``params``; a leaf without mask (``None``) is returned as it is.

    Returns:
      A tree like ``params``.

    Raises:
      ValueError: if the masks do not fit the parameters.
      TypeError: if a mask is not bool.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.apply_masks({"w": jnp.ones(2)}, {"w": jnp.array([True, False])})["w"].tolist()
      [1.0, 0.0]
    """
    _tree.check_masks(masks, params)
    return zero_where_pruned(params, masks)


def straight_through(params: Params, masks: Masks) -> Params:
    r"""Masked weights for a forward pass whose gradient reaches every weight.

    .. math:: \hat w = m \odot w, \quad \partial \hat w / \partial w := 1

    Args:
      params: a tree of arrays.
      masks: bool masks like ``params``, ``None`` where there is none.

    Returns:
      A tree like ``params``; exactly zero where pruned.

    Raises:
      ValueError: if the masks do not fit the parameters.
      TypeError: if a mask is not bool.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> masks = {"w": jnp.array([True, False])}
      >>> loss = lambda p: jnp.sum(jp.straight_through(p, masks)["w"] ** 2)
      >>> jax.grad(loss)({"w": jnp.array([1.0, 3.0])})["w"].tolist()
      [2.0, 0.0]

    Reference:
      Bengio, Leonard, Courville. Estimating or Propagating Gradients Through Stochastic Neurons for
      Conditional Computation, 2013; Zhou et al. Learning N:M Fine-grained Structured Sparse Neural
      Networks From Scratch, 2021.
    """
    _tree.check_masks(masks, params)
    return _apply(_straight_through, params, masks)


def density(masks: Masks) -> jax.Array:
    r"""Fraction of the governed weights that are kept, as a scalar that may be traced.

    .. math:: d = \textstyle\sum_i k_i \,/ \sum_i n_i

    Args:
      masks: bool masks, ``None`` where not governed.

    Returns:
      A float32 scalar.

    Raises:
      ValueError: if there is no mask.
      TypeError: if a mask is not bool, as of packed masks, or of parameters.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> float(jp.density({"w": jnp.array([True, False]), "b": None}))
      0.5
    """
    leaves = jax.tree.leaves(masks)
    if not leaves:
        raise ValueError("no mask to measure: the tree holds no leaf")
    _tree.check_bools(masks)
    counts = jnp.stack([jnp.sum(mask, dtype=jnp.uint32) for mask in leaves])
    kept = _exact.to_float(_exact.total(counts))[0]
    return _loops.divide(kept, sum(mask.size for mask in leaves))


def pack_masks(masks: Masks) -> PyTree:
    """Store masks one bit a weight, eight along the last axis to a byte.

    Args:
      masks: bool masks, ``None`` where not governed.

    Returns:
      uint8 arrays like ``masks`` whose last axis is an eighth, rounded up.

    Raises:
      TypeError: if a mask is not bool.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.pack_masks({"w": jnp.ones((2, 16), bool)})["w"].shape
      (2, 2)
    """
    _tree.check_bools(masks)
    return _tree.map_governed(lambda m: jnp.packbits(jnp.atleast_1d(m), -1), masks)


def unpack_masks(packed: PyTree, params: Params) -> Masks:
    """Undo ``pack_masks``.

    Args:
      packed: what ``pack_masks`` gave.
      params: the parameters that the masks belong to; only shapes matter.

    Returns:
      Bool masks of the parameters' shapes, ``None`` where not governed.

    Raises:
      ValueError: if the packed masks do not fit the parameters.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> masks = {"w": jnp.array([True, False, True])}
      >>> jp.unpack_masks(jp.pack_masks(masks), {"w": jnp.ones(3)})["w"].tolist()
      [True, False, True]
    """

    def unpack(path, leaf, bits):
        shape = jnp.shape(leaf) or (1,)
        if bits.dtype == jnp.bool_:
            raise ValueError(f"{path}: the masks are not packed; leave packed=True out")
        if bits.dtype != jnp.uint8 or bits.shape != (*shape[:-1], -(-shape[-1] // 8)):
            raise ValueError(
                f"{path}: packed masks of type {bits.dtype} and shape {bits.shape} do not fit "
                f"a leaf of shape {jnp.shape(leaf)}; pack the masks of these params"
            )
        return jnp.unpackbits(bits, -1, count=shape[-1]).astype(bool).reshape(jnp.shape(leaf))

    return _tree.map_governed_with_path(unpack, params, packed)


def allocate_and_mask(scores: Scores, sparsity: Any, allocate: Allocation, mask: Masking) -> Masks:
    """``mask(scores, allocate(scores, sparsity))``."""
    _checks.check_steps(allocate=allocate, mask=mask)
    if mask is mask_topk:
        return _tree.unflatten(scores, _selection(scores, sparsity, allocate).masks)
    return mask(scores, allocate(scores, sparsity))


def shrink_masks(
    masks: Masks, scores: Scores, sparsity: Any, allocate: Allocation, mask: Masking
) -> tuple[Masks, jax.Array]:
    """What is chosen of the masks, and whether a score of theirs is NaN: then nothing is pruned."""
    scores = _like(masks, _fitting("scores", masks, scores, "masks"))
    if mask is mask_topk:
        found = _selection(scores, sparsity, allocate, masks)
        return _tree.unflatten(scores, found.masks), found.bad
    buried = bury(masks, scores)
    kept = _tree.map_governed(jnp.logical_and, masks, mask(buried, allocate(buried, sparsity)))
    bad = _leaves.any_nan(buried)
    return unless(bad, kept, masks), bad


def bury(masks: Masks, scores: Scores) -> Scores:
    """Scores in which weights already pruned come last, so that exact counts stay exact."""
    return _tree.map_governed(_leaves.burying(), masks, scores)


def unless(bad: jax.Array, found: PyTree, previous: PyTree) -> PyTree:
    """What was found, or what was before if the scores are bad: to be tried again."""
    return jax.tree.map(lambda new, old: lax.select(bad, old, new), found, previous)


def _selection(
    scores: Scores, sparsity: Any, allocate: Allocation, alive: Masks | None = None
) -> _topk.Found:
    """Allocate and rank, among the weights that are alive.

    A global threshold is not looked for twice, and counts that come as a vector stay one.
    """
    call, options = (
        (allocate.func, allocate.keywords) if isinstance(allocate, partial) else (allocate, {})
    )
    if call is allocation.allocate_global and not options.get("costs"):
        return allocation.shared_selection(scores, sparsity, alive=alive, **options)
    keep: Any
    if call is allocation.allocate_uniform:
        keep = allocation.uniform_counts(scores, sparsity, **options)
    else:
        given = allocate(scores if alive is None else bury(alive, scores), sparsity)
        check_scores(scores, given)
        keep = jax.tree.leaves(_like(scores, given))
    return _best(scores, keep, alive)


def _best(scores: Scores, keep: Any, alive: Masks | None = None) -> _topk.Found:
    """``mask_topk`` of a list or vector with the count of each governed leaf."""
    return _topk.top(
        jax.tree.leaves(scores),
        keep,
        kinds=_tree.kinds(scores),
        alive=None if alive is None else jax.tree.leaves(alive),
    )


def where_kept(leaf: jax.Array, mask: jax.Array) -> jax.Array:
    """``leaf`` where kept, else zero."""
    return lax.select(mask, leaf, _placement.full_like(leaf, 0))


def zero_where_pruned(tree: PyTree, masks: Masks) -> PyTree:
    """Zero where pruned; leaves without a mask as they are."""
    zeros = _placement.filling(lambda _: 0)
    return _apply(lambda leaf, mask: lax.select(mask, leaf, zeros(leaf)), tree, masks)


@jax.custom_jvp
def _straight_through(leaf: jax.Array, mask: jax.Array) -> jax.Array:
    return where_kept(leaf, mask)


@_straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    return _straight_through(*primals), tangents[0]


def _apply(f, params: Params, masks: Masks) -> Params:
    return jax.tree.map(
        lambda p, m: p if p is None or m is None else f(p, m), params, masks, is_leaf=_tree.is_none
    )


def check_scores(scores: Scores, keep: Counts | None = None) -> None:
    """Raise unless scores can be ranked and ``keep`` fits them."""
    for path, leaf in _tree.leaves_with_paths(scores):
        if leaf is not None:
            _tree.check_prunable(path, leaf)
    if keep is None:
        return

    def check(path, leaf, k):
        if np.ndim(k) != 0:
            raise ValueError(f"{path}: keep has shape {np.shape(k)}; it is one count per leaf")
        if not jnp.issubdtype(jnp.result_type(k), jnp.integer):
            raise TypeError(
                f"{path}: keep is {k}, no whole number; it counts weights: take it from an "
                "allocation, such as allocate_uniform(scores, sparsity)"
            )
        if _checks.is_concrete(k) and not 0 <= int(k) <= leaf.size:
            raise ValueError(f"{path}: cannot keep {int(k)} of {leaf.size} weights")

    _tree.map_governed_with_path(check, scores, _fitting("keep", scores, keep))


def _fitting(what: str, scores: Scores, tree: PyTree, other: str = "scores") -> PyTree:
    """``tree``, which must have a value wherever ``scores`` has."""
    ours, theirs = _tree.structure(scores), _tree.structure(tree)
    missing = [
        path
        for (path, leaf), value in zip(
            _tree.leaves_with_paths(scores),
            jax.tree.leaves(tree, is_leaf=_tree.is_none),
            strict=False,
        )
        if leaf is not None and value is None
    ]
    if ours != theirs or missing:
        raise ValueError(
            f"{what} and {other} have different trees, first at {[*missing, 'the root'][0]}; "
            f"{what} needs one entry for every governed leaf"
        )
    return tree


def _like(governed: PyTree, tree: PyTree) -> PyTree:
    """``tree`` where another is governed."""
    return _tree.map_governed(lambda _, leaf: leaf, governed, tree)


def axis_tree(scores: Scores, axis: Any) -> PyTree:
    """``axis`` for every leaf: an int or tuple of ints serves all, a tree each its own."""
    if isinstance(axis, int) or (
        isinstance(axis, tuple) and all(isinstance(part, int) for part in axis)
    ):
        return _tree.map_governed(lambda _: axis, scores)
    return axis


def resolve_axes(path: str, leaf: Any, axes: Any) -> tuple[int, ...]:
    """Axes as a tuple of non-negative ints; raises with the path if one is missing or doubled."""
    given = (axes,) if isinstance(axes, int) else tuple(axes)
    resolved = tuple(axis + leaf.ndim if axis < 0 else axis for axis in given)
    inside = all(0 <= axis < leaf.ndim for axis in resolved)
    if not given or not inside or len(set(resolved)) != len(resolved):
        raise ValueError(
            f"{path}: axes {given} do not name distinct axes of shape {leaf.shape}; "
            "give each leaf its own with a tree, or govern fewer leaves"
        )
    return resolved


def _topk_along(path: str, leaf: jax.Array, keep: Any, axis: Any) -> jax.Array:
    axes = resolve_axes(path, leaf, axis)
    shape = [1 if a in axes else n for a, n in enumerate(leaf.shape)]
    slices = int(np.prod(shape))
    keep = jnp.asarray(keep).astype(jnp.int32)
    first = jnp.arange(slices, dtype=jnp.int32).reshape(shape) < keep % slices
    return _topk.top_slices(leaf, keep // slices + first.astype(jnp.int32), axes=axes)
