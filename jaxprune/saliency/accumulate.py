"""Criteria summed over the steps of training."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune import _checks, _tree
from jaxprune._leaves import any_nan
from jaxprune._typing import Params, PyTree, Saliency, Scores
from jaxprune.saliency.weights import required_gradients


class Accumulated(NamedTuple):
    """A saliency with a memory, which a transform keeps in its state.

    Attributes:
      init: ``params -> memory``.
      update: ``(params, grads, memory, *, key=None) -> (scores, memory)``.
    """

    init: Callable[[Params], PyTree]
    update: Callable[..., tuple[Scores, PyTree]]


def accumulate(saliency: Saliency, decay: float) -> Accumulated:
    r"""Sum a saliency over the steps of training, the older the less.

    .. math:: S_t = \gamma S_{t-1} + s_t

    A step whose scores are NaN is not remembered. Ranks do not depend on the scale of scores; for a
    threshold on an average, multiply it by :math:`1 / (1 - \gamma)`.

    Args:
      saliency: ``(params, grads, key=) -> scores``, called at every step.
      decay: :math:`\gamma` in [0, 1]; 1 gives the plain sum.

    Returns:
      An ``(init, update)`` pair that transforms take wherever they take a saliency.

    Raises:
      ValueError: if the decay is outside [0, 1].

    Example:
      >>> import optax, jaxprune as jp
      >>> tx = jp.prune_gradually(optax.sgd(0.1), 0.5, when=jp.every(10),
      ...                         saliency=jp.accumulate(jp.taylor, 0.9))

    Reference:
      Sanh, Wolf, Rush. Movement Pruning: Adaptive Sparsity by Fine-Tuning, 2020 (sums); Molchanov
      et al. Importance Estimation for Neural Network Pruning, 2019 (averages).
    """
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay is {decay}; it is a number in [0, 1]")
    _checks.check_step("saliency", saliency, None, "key")

    def init(params: Params) -> PyTree:
        return _tree.map_governed(lambda p: jnp.zeros_like(_tree.widen(p)), params)

    def update(params, grads, memory, *, key=None):
        fresh = saliency(params, grads, key=key)
        scores = _tree.map_governed(
            lambda old, s: old * jnp.asarray(decay, old.dtype) + s.astype(old.dtype), memory, fresh
        )
        bad = any_nan(fresh)
        return scores, jax.tree.map(lambda old, s: jnp.where(bad, old, s), memory, scores)

    return Accumulated(init, update)


def _toward_zero(
    params: Params, grads: Params | None = None, *, key: jax.Array | None = None
) -> Scores:
    """-w g: large where gradient descent moves a weight away from zero."""
    del key
    grads = required_gradients(grads, params, "movement")
    return _tree.map_governed(lambda w, g: -_tree.widen(w) * _tree.widen(g), params, grads)


movement = accumulate(_toward_zero, 1.0)
r"""Movement: how far training has moved each weight away from zero.

.. math:: S_t = - \sum_{\tau \le t} w_\tau \, \partial L_\tau / \partial w

A saliency with a memory, for transforms; scores may be negative. Raises a ``ValueError`` without
gradients.

Reference:
  Sanh, Wolf, Rush. Movement Pruning: Adaptive Sparsity by Fine-Tuning, 2020.
"""


def check_criterion(saliency: Any, name: str = "saliency") -> None:
    """Raise a ``TypeError`` for what a transform cannot take as a saliency."""
    if not isinstance(saliency, Accumulated):
        _checks.check_step("saliency", saliency, name, "key")


def memory_of(saliency: Any, params: Params) -> PyTree:
    """The memory to start from; bare functions have none."""
    return saliency.init(params) if isinstance(saliency, Accumulated) else ()


def score(
    saliency: Any, params: Params, grads: Params, memory: PyTree, key: jax.Array | None
) -> tuple[Callable[[], Scores], PyTree]:
    """Scores to ask for when they are needed, and the memory.

    A criterion with a memory runs at every step; a bare function only when asked.
    """
    if isinstance(saliency, Accumulated):
        scores, memory = saliency.update(params, grads, memory, key=key)
        return lambda: scores, memory
    return lambda: saliency(params, grads, key=key), memory
