"""What the pruning transforms share: their state, and exact zeros around any inner optimizer."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxprune import _checks, _tree
from jaxprune._placement import placed_like
from jaxprune._typing import Masks, Params, Prunable, PyTree, Saliency, Trigger
from jaxprune.masks import pack_masks, unless, unpack_masks, zero_where_pruned
from jaxprune.saliency.accumulate import check_criterion, memory_of, score
from jaxprune.transforms._moments import (
    check_composes,
    check_restartable,
    mask_averages,
    restart,
)


class PruningState(NamedTuple):
    """State of a pruning transform.

    Attributes:
      step: updates done so far, int32.
      masks: bool like the parameters (uint8 if packed), ``None`` where not governed.
      sparsity: the fraction last asked for, float32; NaN where a threshold decides.
      target: the fraction asked for in the end, under its own name, so that a checkpoint of a run
        at another sparsity does not fit.
      pending: whether a mask update met NaN and is to be tried again.
      memories: of the criteria that have one.
      dense: what a method that trains dense weights keeps besides the visible ones.
      inner_state: of the wrapped optimizer.
    """

    step: jax.Array
    masks: Masks
    sparsity: jax.Array
    target: dict[str, jax.Array]
    pending: jax.Array
    memories: tuple[PyTree, ...]
    dense: PyTree
    inner_state: optax.OptState


Propose = Callable[..., tuple[Masks, Any, jax.Array]]
"""``propose(old, step, *scores) -> (new masks, requested sparsity, whether scores are bad)``.

Where scores are bad the new masks are the old ones.
"""


def masked_training(
    inner: optax.GradientTransformation,
    propose: Propose,
    *,
    start: Callable[[Params], tuple[Masks, Any]],
    when: Trigger,
    criteria: Mapping[str, Saliency],
    keys: Callable[[jax.Array], Any],
    target: optax.Schedule,
    regrows: bool,
    packed: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """The transform that all methods with masked weights are.

    At a trigger the criteria score the governed parameters and ``propose`` turns masks into new
    ones. Weights that come back start at zero, with the optimizer state of a fresh start.

    Args:
      inner: the wrapped optimizer.
      propose: new masks from old ones and the scores of each criterion.
      start: ``params -> (masks, sparsity)``.
      when: the updates at which masks are proposed.
      criteria: saliencies by the names of their arguments, each with or without a memory.
      keys: ``step -> keys``, one for each criterion.
      target: the sparsity over time, or what else a checkpoint must agree with.
      regrows: whether weights may come back; the optimizer is then checked in ``init``.
      packed: store the masks one bit a weight.
    """
    _checks.check_steps(when=when)
    _checks.check_optimizer(inner)
    for name, criterion in criteria.items():
        check_criterion(criterion, name)
    inner = optax.with_extra_args_support(inner)
    goal = _checks.Target(target)

    def init(params: Params) -> PruningState:
        masks, sparsity = start(params)
        check_composes(inner, params)
        if regrows and jax.tree.leaves(masks):
            check_restartable(inner, params)
        governed = _tree.map_governed(lambda _, p: p, masks, params)
        return PruningState(
            step=jnp.zeros((), jnp.int32),
            masks=pack_masks(masks) if packed else masks,
            sparsity=jnp.asarray(sparsity, jnp.float32),
            target=goal.start(),
            pending=jnp.zeros((), bool),
            memories=tuple(memory_of(criterion, governed) for criterion in criteria.values()),
            dense=(),
            inner_state=inner.init(params),
        )

    @jax.jit  # compiled once even where update is called eagerly
    def decide(before, step, memories, governed, dense):
        old, sparsity, pending = before
        parts = zip(criteria.values(), memories, keys(step), strict=True)
        scored = [score(c, governed, dense, memory, key) for c, memory, key in parts]

        def recompute():
            new, wanted, bad = propose(old, step, *(ask() for ask, _ in scored))
            return new, unless(bad, jnp.asarray(wanted, jnp.float32), sparsity), bad

        due = jnp.asarray(when(step)) | pending
        same = (old, sparsity, jnp.zeros_like(pending))
        return lax.cond(due, recompute, lambda: same), tuple(m for _, m in scored), due

    @jax.jit
    def refresh(due, inner_state, params, grown):
        return lax.cond(
            due, lambda: restart(inner, inner_state, params, grown), lambda: inner_state
        )

    def update(updates, state, params=None, **extra):
        check_update(updates, params)
        check_state(state, len(criteria), 0)
        goal.check(state.target)
        if not packed and any(m.dtype == jnp.uint8 for m in jax.tree.leaves(state.masks)):
            raise ValueError("the state's masks are packed; make the transform with packed=True")
        old = unpack_masks(state.masks, params) if packed else state.masks
        _tree.check_like("the state's masks", old, params)
        governed = _tree.map_governed(lambda _, p: p, old, params)
        dense = _tree.map_governed(lambda _, g: g, old, updates)
        before = (old, state.sparsity, state.pending)
        found, memories, due = decide(before, state.step, state.memories, governed, dense)
        current, sparsity, pending = found
        # A weight that comes back counts as pruned in the update that brings it back.
        settled = jax.tree.map(jnp.logical_and, current, old) if regrows else current
        updates, inner_state = inner.update(
            zero_where_pruned(updates, settled), state.inner_state, params, **extra
        )
        if regrows:
            grown = jax.tree.map(lambda new, settled: new & ~settled, current, settled)
            inner_state = refresh(due, inner_state, zero_where_pruned(params, settled), grown)
        return zeroing_updates(updates, params, settled), PruningState(
            step=optax.safe_increment(state.step),
            masks=pack_masks(current) if packed else current,
            sparsity=sparsity,
            target=state.target,
            pending=pending,
            memories=memories,
            dense=(),
            inner_state=mask_averages(inner_state, settled),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def shrinking(
    inner: optax.GradientTransformation,
    propose: Propose,
    *,
    when: Trigger,
    saliency: Saliency,
    prunable: Prunable,
    target: optax.Schedule,
    masks: Masks | None = None,
    key: jax.Array | None = None,
    packed: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """A transform of one criterion that starts dense, and whose masks only lose weights."""
    _checks.check_steps(prunable=prunable)
    _checks.check_key(key, optional=True)

    return masked_training(
        inner,
        propose,
        start=lambda params: (starting_masks(params, prunable, masks), 0.0),
        when=when,
        criteria={"saliency": saliency},
        keys=lambda step: (key_at(key, step),),
        target=target,
        regrows=False,
        packed=packed,
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


def check_state(state: Any, memories: int, dense: int) -> None:
    """Raise unless a state is one of pruning, with so many memories and dense trees."""
    if not isinstance(state, PruningState):
        raise TypeError(
            f"state is {type(state).__name__}, not that of a pruning transform; tx.init(params) "
            "makes it, and a checkpoint is restored into it"
        )
    if (len(state.memories), len(state.dense)) != (memories, dense):
        raise ValueError(
            "the state is that of another pruning method; restore a checkpoint of the same run, or "
            "start anew with masks=jp.get_masks(state, params)"
        )


def check_update(updates: PyTree, params: Params | None) -> None:
    """Raise unless ``update`` was given params that fit the gradients."""
    if params is None:
        raise ValueError(
            "pruning needs the current parameters: call tx.update(grads, state, params)"
        )
    _tree.check_like("updates", updates, params)


def zeroing_updates(updates: PyTree, params: Params, masks: Masks) -> PyTree:
    """``-p`` where pruned, in a type that holds it exactly, so that applying it leaves zero."""

    def emit(u, p, m):
        if u is None or p is None or m is None:
            return u
        dtype = common_type(u, p)
        return lax.select(m, u.astype(dtype), -p.astype(dtype))

    return jax.tree.map(emit, updates, params, masks, is_leaf=_tree.is_none)


def common_type(u: jax.Array, p: jax.Array) -> Any:
    """A type that holds updates and parameters."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(u.dtype, p.dtype)


def key_at(key: jax.Array | None, step: jax.Array) -> jax.Array | None:
    """A fresh key for every update."""
    return None if key is None else jax.random.fold_in(key, step)
