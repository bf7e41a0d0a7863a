"""Optimizer state of regrown weights: what ``inner.init`` gives, whatever the optimizer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune import _tree
from jaxprune._typing import Masks, Params, PyTree
from jaxprune.masks import where_kept


class _Pair:
    """Two arrays as one leaf: a tuple would be a subtree."""

    def __init__(self, now: Any, fresh: Any):
        self.now, self.fresh = now, fresh


def restart(
    inner: optax.GradientTransformation, state: optax.OptState, params: Params, grown: Masks
) -> optax.OptState:
    """Give grown weights the state that ``inner.init(params)`` gives them.

    Zeros would be wrong: Rprop never moves from a step size of 0, Adagrad overshoots. State that a
    weight shares with others (Adafactor's rows and columns) stays.
    """
    fresh = inner.init(params)
    everywhere = jax.tree.map(
        lambda p, g: p if p is None else jnp.zeros((), bool) if g is None else g,
        params,
        grown,
        is_leaf=_tree.is_none,
    )

    def choose(pair, g):
        if _is_masked(pair) or pair.now.shape != g.shape:
            return pair if _is_masked(pair) else pair.now
        return jnp.where(g, pair.fresh, pair.now)

    pairs = jax.tree.map(_Pair, state, fresh)
    return optax.tree.map_params(
        inner,
        choose,
        pairs,
        everywhere,
        transform_non_params=lambda pair: pair.now,
        is_leaf=_is_masked,
    )


def check_restartable(inner: optax.GradientTransformation, params: Params) -> None:
    """Raise a ``ValueError`` if a weight's state cannot be told from that of others."""
    shapes = jax.eval_shape(inner.init, params)
    paths = _tree.map_governed_with_path(lambda path, p: _Named(path, jnp.shape(p)), params)

    def check(leaf, named):
        if not _is_masked(leaf) and np.prod(leaf.shape) > max(1, np.prod(named.shape)):
            raise ValueError(
                f"{named.path}: the optimizer keeps a state of shape {leaf.shape} for a weight of "
                f"shape {named.shape}"
            )

    try:
        optax.tree.map_params(inner, check, shapes, paths, is_leaf=_is_masked)
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            "regrown weights need fresh optimizer state, but this optimizer's state cannot be "
            f"matched to single weights ({error}); use another inner optimizer, or a method that "
            "does not regrow"
        ) from error


def mask_averages(state: optax.OptState, masks: Masks) -> optax.OptState:
    """Zero the pruned weights of parameters that an optimizer keeps in its state.

    Schedule-free optimizers are evaluated at an average of the trained weights and of these.
    """

    def visit(node):
        if not isinstance(node, optax.contrib.ScheduleFreeState):
            return node
        return node._replace(z=jax.tree.map(settle, node.z, masks, is_leaf=_is_absent))

    def settle(z, m):
        return z if _is_absent(z) or m is None else where_kept(z, m)

    return jax.tree.map(visit, state, is_leaf=_is_average)


def check_composes(
    inner: optax.GradientTransformation, params: Params, *, latent: bool = False
) -> None:
    """Raise a ``ValueError`` if pruned weights could not stay zero around this optimizer."""
    nodes = jax.tree.leaves(
        jax.eval_shape(inner.init, params),
        is_leaf=lambda n: _is_average(n) or isinstance(n, optax.LookaheadState),
    )
    if any(isinstance(node, optax.LookaheadState) for node in nodes):
        raise ValueError(
            "lookahead keeps a second, slow copy of the parameters, which a pruning transform does "
            "not mask; use the optimizer without lookahead"
        )
    if latent and any(_is_average(node) for node in nodes):
        raise ValueError(
            "schedule-free optimizers are evaluated at an average of dense weights, which is not "
            "zero where the model's are; use prune_gradually, or an optimizer with a schedule"
        )


class _Named:
    def __init__(self, path: str, shape: tuple[int, ...]):
        self.path, self.shape = path, shape


def _is_average(value: PyTree) -> bool:
    return isinstance(value, optax.contrib.ScheduleFreeState)


def _is_absent(value: PyTree) -> bool:
    return value is None or _is_masked(value)


def _is_masked(value: PyTree) -> bool:
    return isinstance(value, optax.MaskedNode)
