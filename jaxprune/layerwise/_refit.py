"""Least squares on a fixed support: conjugate gradients for all outputs side by side."""

import jax
import jax.numpy as jnp
from jax import lax


def refit(
    start: jax.Array,
    dense: jax.Array,
    mask: jax.Array,
    gram: jax.Array,
    inverse: jax.Array,
    limit: int,
) -> tuple[jax.Array, jax.Array]:
    r"""Minimize :math:`(w - d) G (w - d)^\top` over w that are zero where the mask is.

    The inverse of the whole Gram, restricted to the support, preconditions: its product with the
    restricted Gram is the identity plus a matrix of small rank in practice, so a dozen steps do.

    Args:
      start: (outputs, n), zero outside the mask.
      dense: (outputs, n), the weights to imitate.
      mask: (outputs, n) bool.
      gram: (n, n), positive definite.
      inverse: its inverse, approximately.
      limit: steps at most.

    Returns:
      The weights, and whether every output met the tolerance.
    """
    eps = jnp.finfo(gram.dtype).eps

    def times(a, b):
        return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)

    def restrict(x):
        return jnp.where(mask, x, 0)

    def residual(w):
        return restrict(times(dense - w, gram))

    def dot(a, b):
        return jnp.sum(a * b, -1, keepdims=True)

    def unfinished(state):
        step, *_, size, goal = state
        return (step < limit) & jnp.any(size > goal)

    def body(state):
        step, w, left, along, size, goal = state
        moved = restrict(times(along, gram))
        curvature = dot(along, moved)
        going = (size > goal) & (curvature > 0)
        length = jnp.where(going, size / jnp.where(going, curvature, 1), 0)
        w, left = w + length * along, left - length * moved
        turned = restrict(times(left, inverse))
        next_size = jnp.where(going, dot(left, turned), 0)
        along = turned + jnp.where(going, next_size / jnp.where(going, size, 1), 0) * along
        return step + 1, w, left, along, next_size, goal

    whole = restrict(times(dense, gram))
    goal = (10 * eps) ** 2 * dot(whole, restrict(times(whole, inverse)))
    left = residual(start)
    along = restrict(times(left, inverse))
    state = (jnp.zeros((), jnp.int32), start, left, along, dot(left, along), goal)
    _, w, *_, size, _ = lax.while_loop(unfinished, body, state)
    return w, jnp.all(size <= goal)
