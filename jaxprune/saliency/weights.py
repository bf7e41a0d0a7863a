"""Criteria of weights and gradients; each may drive a transform."""

import jax
import jax.numpy as jnp

from jaxprune import _checks, _tree
from jaxprune._placement import placed_like
from jaxprune._typing import Params, Scores


def magnitude(
    params: Params, grads: Params | None = None, *, key: jax.Array | None = None
) -> Scores:
    r"""Magnitude of each weight.

    .. math:: s = |w|

    Args:
      params: a tree of floating arrays, ``None`` where not governed.
      grads: ignored.
      key: ignored.

    Returns:
      Scores like ``params``, in each leaf's own dtype.

    Raises:
      TypeError: if a leaf is not floating; pass ``jp.select(params)``.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.magnitude({"w": jnp.array([-2.0, 1.0])})["w"].tolist()
      [2.0, 1.0]

    Reference:
      Han, Pool, Tran, Dally. Learning both Weights and Connections for Efficient Neural Networks,
      2015.
    """
    del grads, key
    return _map(jnp.abs, params)


def gradient_magnitude(
    params: Params, grads: Params | None = None, *, key: jax.Array | None = None
) -> Scores:
    r"""Magnitude of each weight's gradient.

    .. math:: s = |\partial L / \partial w|

    Args:
      params: a tree of floating arrays, ``None`` where not governed.
      grads: gradients like ``params``.
      key: ignored.

    Returns:
      Scores like ``params``, in the gradient's dtype.

    Raises:
      ValueError: without gradients, or if they do not fit the parameters.
      TypeError: if a leaf is not floating.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.gradient_magnitude({"w": jnp.ones(2)}, {"w": jnp.array([-3.0, 1.0])})["w"].tolist()
      [3.0, 1.0]

    Reference:
      Evci, Gale, Menick, Castro, Elsen. Rigging the Lottery: Making All Tickets Winners, 2020.
    """
    del key
    grads = required_gradients(grads, params, "gradient_magnitude")
    return _map(lambda w, g: jnp.abs(g), params, grads)


def taylor(params: Params, grads: Params | None = None, *, key: jax.Array | None = None) -> Scores:
    r"""First-order estimate of the loss change when a weight is removed.

    .. math:: s = |w \, \partial L / \partial w|

    Args:
      params: a tree of floating arrays, ``None`` where not governed.
      grads: gradients like ``params``.
      key: ignored.

    Returns:
      Scores like ``params``, float32 or wider.

    Raises:
      ValueError: without gradients, or if they do not fit the parameters.
      TypeError: if a leaf is not floating.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.taylor({"w": jnp.array([2.0, 1.0])}, {"w": jnp.array([-3.0, 1.0])})["w"].tolist()
      [6.0, 1.0]

    Reference:
      Molchanov, Tyree, Karras, Aila, Kautz. Pruning Convolutional Neural Networks for Resource
      Efficient Inference, 2017.
    """
    del key
    grads = required_gradients(grads, params, "taylor")
    return _map(lambda w, g: jnp.abs(_tree.widen(w) * _tree.widen(g)), params, grads)


def random_saliency(
    params: Params, grads: Params | None = None, *, key: jax.Array | None = None
) -> Scores:
    r"""Uniform random scores, the baseline that every criterion must beat.

    .. math:: s \sim U[0, 1)

    Args:
      params: a tree of floating arrays, ``None`` where not governed.
      grads: ignored.
      key: a PRNG key; drivers pass a fresh one at every update.

    Returns:
      Scores like ``params``, float32; a leaf's scores do not depend on which others are governed.

    Raises:
      ValueError: without a key.
      TypeError: if a leaf is not floating.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> jp.random_saliency({"w": jnp.ones(3)}, key=jax.random.key(0))["w"].shape
      (3,)

    Reference:
      Mocanu et al. Scalable training of artificial neural networks with adaptive sparse
      connectivity inspired by network science, 2018.
    """
    del grads
    if key is None:
        raise ValueError("random_saliency needs a PRNG key; pass key=jax.random.key(seed)")
    _checks.check_key(key)
    order = iter(range(len(_tree.leaves_with_paths(params))))
    numbers = jax.tree.map(lambda _: next(order), params, is_leaf=_tree.is_none)
    return _map(
        lambda w, i: placed_like(
            jax.random.uniform(jax.random.fold_in(key, i), w.shape, jnp.float32), w
        ),
        params,
        numbers,
    )


def _map(f, params, *rest):
    def call(path, w, *others):
        _tree.check_prunable(path, w)
        return f(w, *others)

    return _tree.map_governed_with_path(call, params, *rest)


def required_gradients(grads: Params | None, params: Params, name: str) -> Params:
    """Gradients that fit the parameters, or a ``ValueError``."""
    if grads is None:
        raise ValueError(f"{name} needs gradients; pass grads=jax.grad(loss)(params, ...)")
    _tree.check_like("grads", grads, params, allow_extra=True)
    return grads
