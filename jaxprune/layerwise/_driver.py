"""What all layerwise methods share: weights as rows, budgets, damping, checks."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune import _checks, _rows, _tree
from jaxprune._typing import Masks, Params, PyTree
from jaxprune.calibration import Gram

Solve = Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
"""``solve(rows, gram, sparsity) -> (rows, mask, healthy)`` for (groups, outputs, n) weights."""


def prune_leaves(
    params: Params, grams: PyTree, sparsity: Any, n_m: tuple[int, int] | None, solve: Solve
) -> tuple[Params, Masks]:
    """``solve`` for every leaf that has a Gram; the others stay, with ``None`` for a mask."""
    check_target(sparsity, n_m)

    def one(path, leaf, gram, target):
        check_gram(path, leaf, gram, n_m)
        check_finite(path, leaf)
        rows, mask, healthy = solve(as_groups(leaf, gram), matrices(gram), target)
        raise_unless(path, healthy, gram)
        return back(rows, leaf, gram).astype(leaf.dtype), back(mask, leaf, gram)

    governed = _tree.map_governed(lambda leaf, _: leaf, params, grams)
    targets = per_leaf(governed, sparsity)
    pairs = _tree.map_governed_with_path(one, params, grams, targets)
    return unzip(params, pairs)


def unzip(params: Params, pairs: PyTree) -> tuple[Params, Masks]:
    """A tree of (leaf, mask) as two trees, with the leaves of ``params`` where there is none."""
    new = jax.tree.map(
        lambda p, pair: p if pair is None else pair[0], params, pairs, is_leaf=_tree.is_none
    )
    masks = jax.tree.map(
        lambda p, pair: None if pair is None else pair[1], params, pairs, is_leaf=_tree.is_none
    )
    return new, masks


def check_target(sparsity: Any, n_m: tuple[int, int] | None) -> None:
    """Raise unless exactly one of the two says how much to prune."""
    if (sparsity is None) == (n_m is None):
        raise ValueError("give either a sparsity or n_m=(n, m), and not both")
    if n_m is not None and not (isinstance(n_m, tuple) and len(n_m) == 2):
        raise TypeError(f"n_m is {n_m!r}; give a pair of ints such as (2, 4)")
    if n_m is not None and not 0 <= n_m[0] <= n_m[1]:
        raise ValueError(f"n_m is {n_m}; n of each m are kept, 0 <= n <= m")


def per_leaf(governed: Params, sparsity: Any) -> PyTree:
    """``sparsity`` for every governed leaf; a tree like the parameters has one for each."""
    if sparsity is None or jax.tree_util.all_leaves([sparsity]):
        value = 0.0 if sparsity is None else sparsity
        _checks.check_sparsity(value)
        return _tree.map_governed(lambda _: value, governed)
    if _tree.structure(sparsity) != _tree.structure(governed):
        raise ValueError(
            "sparsity and params have different trees; give one number, or one for each governed "
            "leaf of a tree like params"
        )
    leaves, values = map(_tree.leaves_with_paths, (governed, sparsity))
    for (path, leaf), (_, value) in zip(leaves, values, strict=True):
        if leaf is None:
            continue
        if value is None:
            raise ValueError(f"{path}: sparsity is None, but the leaf is governed; give a number")
        _checks.check_sparsity(value, f"{path}: sparsity")
    return _tree.map_governed(lambda _, value: value, governed, sparsity)


def check_gram(path: str, leaf: Any, gram: Any, n_m: tuple[int, int] | None) -> None:
    """Raise unless the Gram belongs to the leaf and the pattern divides its fan-in."""
    _tree.check_prunable(path, leaf)
    if not isinstance(gram, Gram):
        raise TypeError(
            f"{path}: {type(gram).__name__} where a jp.Gram belongs; take grams from "
            "jp.input_grams(apply, params, batches)"
        )
    axes = (*gram.axes, *gram.stack)
    fits = all(0 <= axis < leaf.ndim for axis in axes) and (
        gram.matrix.shape[-1] == gram.matrix.shape[-2] == _rows.fan_in(leaf.shape, gram.use)
        and gram.matrix.ndim == len(gram.stack) + 2
    )
    if not fits:
        raise ValueError(
            f"{path}: a Gram of shape {gram.matrix.shape} over axes {gram.axes} does not fit "
            f"a leaf of shape {leaf.shape}; take grams of these params from jp.input_grams"
        )
    if n_m is not None and gram.matrix.shape[-1] % n_m[1]:
        raise ValueError(
            f"{path}: {n_m[1]} does not divide the fan-in {gram.matrix.shape[-1]}; choose another "
            "m, or leave the leaf out with prunable"
        )


def check_finite(path: str, leaf: Any) -> None:
    """Raise for NaN or infinity in a weight, if that can be known now."""
    finite = jnp.all(jnp.isfinite(leaf))
    if _checks.is_concrete(finite) and not bool(finite):
        raise ValueError(f"{path}: the weight holds NaN or infinity; mend the model first")


def as_groups(leaf: jax.Array, gram: Gram) -> jax.Array:
    """The weight as (groups, outputs, fan-in), float32 or wider."""
    rows = _rows.to_rows(_tree.widen(leaf), gram.use)
    return rows.reshape(-1, *rows.shape[-2:])


def as_rows(mask: jax.Array, gram: Gram) -> jax.Array:
    """A mask as (groups, outputs, fan-in)."""
    rows = _rows.to_rows(mask, gram.use)
    return rows.reshape(-1, *rows.shape[-2:])


def matrices(gram: Gram) -> jax.Array:
    """The Gram as (groups, n, n)."""
    return gram.matrix.reshape(-1, *gram.matrix.shape[-2:])


def back(rows: jax.Array, leaf: jax.Array, gram: Gram) -> jax.Array:
    """Undo ``as_groups``, but for the dtype."""
    return _rows.from_rows(rows, leaf.shape, gram.use)


def raise_unless(path: str, healthy: jax.Array, gram: Gram) -> None:
    """Raise if a Gram was singular; under a trace nothing is known, and the weights are NaN."""
    if _checks.is_concrete(healthy) and not bool(healthy):
        if not bool(jnp.all(jnp.isfinite(gram.matrix))):
            raise ValueError(
                f"{path}: the Gram matrix is not finite; look for NaN or overflow in the "
                "calibration batches and in the weights of layers before"
            )
        raise ValueError(
            f"{path}: the damped Gram matrix is not positive definite; calibrate on more data or "
            "raise damping"
        )


def regularize(gram: jax.Array, damping: Any) -> tuple[jax.Array, jax.Array]:
    """The Gram with ``damping`` times its mean diagonal added, and which inputs are alive.

    A dead input, always zero, gets a one on the diagonal: it takes part in nothing.
    """
    diagonal = jnp.diagonal(gram)
    alive = diagonal > 0
    total = jnp.sum(diagonal) / jnp.maximum(jnp.sum(alive), 1).astype(gram.dtype)
    extra = jnp.where(alive, jnp.asarray(damping, gram.dtype) * total, 1.0)
    return gram + jnp.diag(extra.astype(gram.dtype)), alive


def factor(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The lower Cholesky factor, and whether every pivot stands clear of rounding."""
    lower = lax.linalg.cholesky(gram, symmetrize_input=False)
    clear = jnp.square(jnp.diagonal(lower)) > 10 * jnp.finfo(gram.dtype).eps * jnp.diagonal(gram)
    return lower, jnp.all(clear)


def over_groups(f: Callable[..., Any], *arrays: jax.Array) -> Any:
    """``f`` for each group; one alone runs without a loop around it."""
    if arrays[0].shape[0] == 1:
        return jax.tree.map(lambda x: x[None], f(*(x[0] for x in arrays)))
    return lax.map(lambda xs: f(*xs), arrays)
