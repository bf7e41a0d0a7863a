"""ALPS: support and weights together by ADMM, then conjugate gradients on the support."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune import _topk
from jaxprune._typing import Masks, Params, PyTree
from jaxprune.allocation import allocate_uniform
from jaxprune.layerwise import _driver
from jaxprune.layerwise._refit import refit
from jaxprune.structures.n_m import mask_n_m

_PATIENCE = 3  # iterations between two looks at how the support moves
_REST = 1e-4  # changed fraction of the support below which it is at rest
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # changed fraction of the support, penalty factor


def alps(
    params: Params,
    grams: PyTree,
    sparsity: Any = None,
    *,
    n_m: tuple[int, int] | None = None,
    damping: float = 0.01,
    penalty: float = 0.1,
    iterations: int = 300,
    refinements: int = 10,
) -> tuple[Params, Masks]:
    r"""Search support and weights together: ADMM between least squares and sparsity.

    .. math:: W \leftarrow (G W_0 - V + \rho D)(G + \rho I)^{-1}, \quad
       D \leftarrow P_k(W + V / \rho), \quad V \leftarrow V + \rho (W - D)

    in units in which every input has norm one. The penalty :math:`\rho` grows while the support
    still moves; once it rests, conjugate gradients find the weights for it.

    Args:
      params: a tree of arrays.
      grams: ``jp.Gram`` leaves like ``params``, ``None`` where not governed.
      sparsity: fraction of each governed leaf to remove, or a tree of fractions like ``params``.
      n_m: ``(n, m)`` instead: keep n of each m consecutive inputs of every output.
      damping: added to the diagonal, relative to its mean.
      penalty: the first :math:`\rho`.
      iterations: of ADMM, at most.
      refinements: conjugate gradient steps on the final support.

    Returns:
      ``(params, masks)``: fitted weights, exactly zero where pruned, and bool masks.

    Raises:
      ValueError: if a weight is not finite, the damped Gram is not positive definite, a Gram does
        not fit its leaf, m does not divide the fan-in, or not exactly one of ``sparsity`` and
        ``n_m`` is given.
      TypeError: if a leaf of ``grams`` is not a ``jp.Gram``.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> grams = {"w": jp.Gram(jnp.array([[2.0, 1.9], [1.9, 2.0]]), axes=(0,))}
      >>> params, masks = jp.alps({"w": jnp.array([[1.0], [2.0]])}, grams, 0.5)
      >>> masks["w"].ravel().tolist(), round(float(params["w"][1, 0]), 2)
      ([False, True], 2.94)

    Reference:
      Meng, Behdin, Wang, Mazumder. ALPS: Improved Optimization for Highly Sparse One-Shot Pruning
      for Large Language Models, 2024.
    """

    def solve(rows, gram, target):
        groups, outputs, n = rows.shape
        parts = [jax.ShapeDtypeStruct((outputs, n), jnp.float32)] * groups
        keep = allocate_uniform(parts, 0.0 if n_m else target, min_keep=0)
        options = {"n_m": n_m, "iterations": iterations, "refinements": refinements}
        scalars = jnp.asarray(damping, gram.dtype), jnp.asarray(penalty, gram.dtype)
        return _solve(rows, gram, jnp.stack(keep), *scalars, **options)

    return _driver.prune_leaves(params, grams, sparsity, n_m, solve)


@partial(jax.jit, static_argnames=("n_m", "iterations", "refinements"))
def _solve(rows, gram, keep, damping, penalty, *, n_m, iterations, refinements):
    def one(rows, gram, keep):
        damped, alive = _driver.regularize(gram, damping)
        scale = lax.rsqrt(jnp.diagonal(damped))
        scaled = damped * scale[:, None] * scale[None, :]
        values, vectors = jnp.linalg.eigh(scaled)
        dense = jnp.where(alive[None, :], rows / scale[None, :], 0)

        def project(x):
            size = jnp.where(alive[None, :], jnp.square(x), -1.0)
            return mask_n_m(size, *n_m, axis=1) if n_m else _topk.top([size], [keep]).masks[0]

        mask = _admm(dense, scaled, values, vectors, project, keep, penalty, iterations)
        inverse = _times(vectors / values[None, :], vectors.T)
        start = jnp.where(mask, dense, 0)
        new, _ = refit(start, dense, mask, scaled, inverse, refinements)
        healthy = values[0] > 10 * jnp.finfo(gram.dtype).eps
        return new * scale[None, :], mask, healthy

    new, mask, healthy = _driver.over_groups(one, rows, gram, keep)
    return new, mask, jnp.all(healthy)


def _admm(dense, gram, values, vectors, project, keep, penalty, iterations):
    """The support on which ADMM comes to rest."""
    target = _times(dense, gram)
    kept = jnp.maximum(keep, 1).astype(gram.dtype)

    def unfinished(state):
        step, *_, moving = state
        return (step < iterations) & moving

    def body(state):
        step, sparse, dual, mask, rho, _ = state
        inverse = _times(vectors / (values + rho)[None, :], vectors.T)

        def turn(_, state):
            sparse, dual, mask = state
            w = _times(target - dual + rho * sparse, inverse)
            shifted = w + dual / rho
            mask = project(shifted)
            sparse = jnp.where(mask, shifted, 0)
            return sparse, dual + rho * (w - sparse), mask

        sparse, dual, now = lax.fori_loop(0, _PATIENCE, turn, (sparse, dual, mask))
        changed = jnp.sum(mask != now, dtype=jnp.int32).astype(gram.dtype)
        conditions = [changed >= share * kept for share, _ in _GROWTH]
        factors = [jnp.asarray(factor, gram.dtype) for _, factor in _GROWTH]
        rho = rho * jnp.select(conditions, factors)
        return step + _PATIENCE, sparse, dual, now, rho, changed > _REST * kept

    mask = project(dense)
    sparse = jnp.where(mask, dense, 0)
    state = (jnp.zeros((), jnp.int32), sparse, jnp.zeros_like(dense), mask, penalty, True)
    return lax.while_loop(unfinished, body, state)[3]


def _times(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
