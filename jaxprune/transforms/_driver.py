"""What the pruning transforms share: their state, and exact zeros around any inner optimizer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune import _tree
from jaxprune._placement import placed_like
from jaxprune._typing import Masks, Params, Prunable, PyTree, Saliency, Scores, Trigger
from jaxprune.masks import pack_masks, unpack_masks, where_kept


class PruningState(NamedTuple):
    """State of a pruning transform.

    Attributes:
      step: updates done so far, int32.
      masks: bool like the parameters (uint8 if packed), ``None`` where not governed.
      sparsity: the fraction last asked for, float32; NaN where a threshold decides.
      pending: whether a mask update met NaN and is to be tried again.
      inner_state: of the wrapped optimizer.
    """

    step: jax.Array
    masks: Masks
    sparsity: jax.Array
    pending: jax.Array
    inner_state: optax.OptState


Remask = Callable[[Scores, jax.Array, Masks], tuple[Masks, jax.Array]]
"""``remask(scores, step, old masks) -> (new masks, requested sparsity)``."""


def shrinking(
    inner: optax.GradientTransformation,
    remask: Remask,
    *,
    when: Trigger,
    saliency: Saliency,
    prunable: Prunable,
    masks: Masks | None = None,
    key: jax.Array | None = None,
    packed: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """A transform whose masks only lose weights: at a trigger, ``masks & remask(scores)``."""
    inner = optax.with_extra_args_support(inner)

    def init(params: Params) -> PruningState:
        start = starting_masks(params, prunable, masks)
        return new_state(pack_masks(start) if packed else start, inner.init(params))

    @jax.jit  # compiled once even where update is called eagerly
    def decide(before, step, governed, dense):
        old, sparsity, pending = before

        def recompute():
            scores = saliency(governed, dense, key=key_at(key, step))
            alive = _tree.map_governed(_bury, old, scores)
            new, wanted = remask(alive, step, old)
            new = _tree.map_governed(jnp.logical_and, old, new)
            return keep_unless_nan(before, (new, wanted), any_nan(alive))

        same = (old, sparsity, jnp.zeros_like(pending))
        return jax.lax.cond(jnp.asarray(when(step)) | pending, recompute, lambda: same)

    def update(updates, state, params=None, **extra):
        check_update(updates, params)
        old = unpack_masks(state.masks, params) if packed else state.masks
        governed = _tree.map_governed(lambda _, p: p, old, params)
        dense = _tree.map_governed(lambda _, g: g, old, updates)
        before = (old, state.sparsity, state.pending)
        current, sparsity, pending = decide(before, state.step, governed, dense)
        updates, inner_state = inner.update(
            masked_gradients(updates, current), state.inner_state, params, **extra
        )
        return zeroing_updates(updates, params, current), PruningState(
            step=optax.safe_increment(state.step),
            masks=pack_masks(current) if packed else current,
            sparsity=sparsity,
            pending=pending,
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def new_state(masks: Masks, inner_state: optax.OptState, sparsity: Any = 0.0) -> PruningState:
    """The state before the first update."""
    return PruningState(
        step=jnp.zeros((), jnp.int32),
        masks=masks,
        sparsity=jnp.asarray(sparsity, jnp.float32),
        pending=jnp.zeros((), bool),
        inner_state=inner_state,
    )


def starting_masks(params: Params, prunable: Prunable, masks: Masks | None = None) -> Masks:
    """All kept where governed, or a copy of the given masks, which must agree with ``prunable``."""
    governed = _tree.select(params, prunable)
    if masks is None:
        return jax.tree.map(lambda p: placed_like(jnp.ones(jnp.shape(p), bool), p), governed)
    _tree.check_masks(masks, params)
    pairs = zip(_tree.leaves_with_paths(governed), _tree.leaves_with_paths(masks), strict=True)
    for (path, leaf), (_, mask) in pairs:
        if (leaf is None) != (mask is None):
            raise ValueError(
                f"{path}: "
                + (
                    "the masks cover a leaf that prunable leaves out"
                    if leaf is None
                    else "prunable selects a leaf that the masks leave out"
                )
                + "; pass a prunable that selects just the masked leaves"
            )
    return copy_masks(masks)


def copy_masks(masks: Masks) -> Masks:
    """Fresh buffers, so that donating the state does not delete the caller's masks."""
    return jax.tree.map(lambda m: jnp.array(m, copy=True), masks)


def check_update(updates: PyTree, params: Params | None) -> None:
    """Raise unless ``update`` was given params that fit the gradients."""
    if params is None:
        raise ValueError(
            "pruning needs the current parameters: call tx.update(grads, state, params)"
        )
    _tree.check_like("updates", updates, params)


def masked_gradients(updates: PyTree, masks: Masks) -> PyTree:
    """Gradients that are zero where pruned."""
    return jax.tree.map(
        lambda u, m: u if u is None or m is None else where_kept(u, m),
        updates,
        masks,
        is_leaf=_tree.is_none,
    )


def zeroing_updates(updates: PyTree, params: Params, masks: Masks) -> PyTree:
    """``-p`` where pruned, in a type that holds it exactly, so that applying it leaves zero."""

    def emit(u, p, m):
        if u is None or p is None or m is None:
            return u
        with jax.numpy_dtype_promotion("standard"):
            dtype = jnp.promote_types(u.dtype, p.dtype)
        return jnp.where(m, u.astype(dtype), -p.astype(dtype))

    return jax.tree.map(emit, updates, params, masks, is_leaf=_tree.is_none)


def any_nan(scores: Scores) -> jax.Array:
    """Whether any score is NaN."""
    leaves = [jnp.any(jnp.isnan(leaf)) for leaf in jax.tree.leaves(scores)]
    return jnp.any(jnp.stack(leaves)) if leaves else jnp.zeros((), bool)


def keep_unless_nan(previous, found, bad):
    """``(masks, sparsity, pending)``: what was found, or what was before and another try."""
    masks, sparsity, _ = previous
    chosen = jax.tree.map(lambda a, b: jnp.where(bad, a, b), (masks, sparsity), found)
    return *chosen, bad


def key_at(key: jax.Array | None, step: jax.Array) -> jax.Array | None:
    """A fresh key for every update."""
    return None if key is None else jax.random.fold_in(key, step)


def _bury(mask: jax.Array, score: jax.Array) -> jax.Array:
    """Scores in which weights already pruned come last, so that exact counts stay exact."""
    return jnp.where(mask, score, jnp.asarray(-jnp.inf, score.dtype))
