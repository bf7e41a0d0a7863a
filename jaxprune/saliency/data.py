"""Criteria that average gradients over data."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import _checks, _tree
from jaxprune._typing import Params, Scores

Loss = Callable[..., jax.Array]


def snip(loss: Loss, params: Params, batches: Iterable[Any]) -> Scores:
    r"""Connection sensitivity: what removing each weight changes, averaged over data.

    .. math:: s = |w \, E_b[\partial L_b / \partial w]|

    Args:
      loss: ``loss(params, *batch) -> scalar``; jitted once.
      params: a tree of arrays; leaves that are not floating get ``None``.
      batches: an iterable; a tuple is splatted into ``loss``, anything else is one argument.

    Returns:
      Scores like ``params``, float32 or wider.

    Raises:
      ValueError: if there is no batch.
      TypeError: if ``batches`` is one array.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> loss = lambda p, x: jnp.sum(p["w"] * x)
      >>> jp.snip(loss, {"w": jnp.array([1.0, 2.0])}, [jnp.ones(2), jnp.full(2, 3.0)])["w"].tolist()
      [2.0, 4.0]

    Reference:
      Lee, Ajanthan, Torr. SNIP: Single-shot Network Pruning based on Connection Sensitivity, 2019.
    """
    mean = _mean_over_batches(loss, params, batches, lambda g: g)
    return _tree.map_governed(lambda w, g: jnp.abs(_tree.widen(w) * g), _floating(params), mean)


def fisher(loss: Loss, params: Params, batches: Iterable[Any]) -> Scores:
    r"""Second-order estimate of the loss increase, with the empirical Fisher as curvature.

    .. math:: s = \tfrac{1}{2} w^2 \, E_b[(\partial L_b / \partial w)^2]

    The expectation is over batches: a batch of one example gives the Fisher of the paper, larger
    ones a cheaper estimate in which the noise of single examples partly cancels.

    Args:
      loss: ``loss(params, *batch) -> scalar``; jitted once.
      params: a tree of arrays; leaves that are not floating get ``None``.
      batches: an iterable; a tuple is splatted into ``loss``, anything else is one argument.

    Returns:
      Scores like ``params``, float32 or wider.

    Raises:
      ValueError: if there is no batch.
      TypeError: if ``batches`` is one array.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> loss = lambda p, x: jnp.sum(p["w"] * x)
      >>> jp.fisher(loss, {"w": jnp.array([1.0, 2.0])}, [jnp.ones(2), -jnp.ones(2)])["w"].tolist()
      [0.5, 2.0]

    Reference:
      Theis, Korshunova, Tejani, Huszar. Faster gaze prediction with dense networks and Fisher
      pruning, 2018.
    """
    mean = _mean_over_batches(loss, params, batches, jnp.square)
    return _tree.map_governed(
        lambda w, g: jnp.square(_tree.widen(w)) * g * 0.5, _floating(params), mean
    )


def as_args(batch: Any) -> tuple[Any, ...]:
    """The arguments that an element of ``batches`` stands for."""
    return batch if isinstance(batch, tuple) else (batch,)


def _floating(params: Params) -> Params:
    def pick(leaf):
        dtype = getattr(leaf, "dtype", None)
        return leaf if dtype is not None and jnp.issubdtype(dtype, jnp.floating) else None

    return jax.tree.map(pick, params)


def _mean_over_batches(loss, params, batches, f):
    """The mean of ``f(gradient)`` over batches, float32 or wider, ``None`` where not floating."""
    _checks.check_batches(batches)
    trained = _floating(params)

    def total(total, trained, batch):
        def merged(trained):
            pairs = jax.tree.map(
                lambda t, p: p if t is None else t, trained, params, is_leaf=_tree.is_none
            )
            return loss(pairs, *batch)

        grads = jax.grad(merged)(trained)
        return _tree.map_governed(lambda t, g: t + f(_tree.widen(g)).astype(t.dtype), total, grads)

    add = jax.jit(total)
    mean = _tree.map_governed(lambda w: jnp.zeros_like(_tree.widen(w)), trained)
    n = 0
    for n, batch in enumerate(batches, start=1):  # noqa: B007
        mean = add(mean, trained, as_args(batch))
    if n == 0:
        raise ValueError("no batches to average over; an exhausted generator gives none either")
    return _tree.map_governed(lambda m: m / n, mean)
