"""SparseGPT: prune column by column, and let the columns to the right make up for it."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune import _topk
from jaxprune._typing import Masks, Params, PyTree
from jaxprune.allocation import allocate_uniform
from jaxprune.layerwise import _driver
from jaxprune.structures.n_m import mask_n_m

_STRIP = 16  # columns


def sparsegpt(
    params: Params,
    grams: PyTree,
    sparsity: Any = None,
    *,
    n_m: tuple[int, int] | None = None,
    block: int = 128,
    damping: float = 0.01,
) -> tuple[Params, Masks]:
    r"""Prune column by column; columns not yet reached are corrected for the error made.

    .. math:: s_{ij} = w_{ij}^2 / u_{jj}^2, \quad
       w_{i,j:} \leftarrow w_{i,j:} - \frac{w_{ij}}{u_{jj}}\, u_{j,j:} \ \text{where pruned}, \quad
       U^\top U = (G + \delta \overline{\operatorname{diag} G}\, I)^{-1}

    Inputs that are always zero (dead) lose their weights' values.

    Args:
      params: a tree of arrays.
      grams: ``jp.Gram`` leaves like ``params``, ``None`` where not governed.
      sparsity: fraction of each governed leaf to remove, or a tree of fractions like ``params``.
      n_m: ``(n, m)`` instead: keep n of each m consecutive inputs of every output.
      block: columns whose mask is chosen together and whose errors reach the rest lazily.
      damping: added to the diagonal, relative to its mean.

    Returns:
      ``(params, masks)``: corrected weights, exactly zero where pruned, and bool masks.

    Raises:
      ValueError: if a weight is not finite, the damped Gram is not positive definite, a Gram does
        not fit its leaf, m does not divide the fan-in, or not exactly one of ``sparsity`` and
        ``n_m`` is given.
      TypeError: if a leaf of ``grams`` is not a ``jp.Gram``.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> grams = {"w": jp.Gram(jnp.array([[2.0, 1.9], [1.9, 2.0]]), axes=(0,))}
      >>> params, masks = jp.sparsegpt({"w": jnp.array([[1.0], [2.0]])}, grams, 0.5)
      >>> masks["w"].ravel().tolist(), round(float(params["w"][1, 0]), 2)
      ([False, True], 2.94)

    Reference:
      Frantar, Alistarh. SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot,
      2023.
    """
    if block < 1:
        raise ValueError(f"block is {block}; it is a number of columns, 1 or more")

    def solve(rows, gram, target):
        groups, outputs, n = rows.shape
        width = min(block if n_m is None else max(block // n_m[1], 1) * n_m[1], n)
        keep = None if n_m else _keep_of_blocks(groups, outputs, n, width, target)
        return _solve(rows, gram, keep, jnp.asarray(damping, gram.dtype), n_m=n_m, block=width)

    return _driver.prune_leaves(params, grams, sparsity, n_m, solve)


def _keep_of_blocks(groups, outputs, n, block, sparsity) -> jax.Array:
    """How many weights each block of columns keeps, (groups, blocks): the leaf's total is exact."""
    sizes = [min(block, n - at) for at in range(0, n, block)]
    blocks = [jax.ShapeDtypeStruct((outputs, size), jnp.float32) for size in sizes]
    keep = allocate_uniform(blocks * groups, sparsity, min_keep=0)
    return jnp.stack(keep).reshape(groups, len(sizes))


@partial(jax.jit, static_argnames=("n_m", "block"))
def _solve(rows, gram, keep, damping, *, n_m, block):
    n = rows.shape[-1]
    short = -n % block
    if keep is None:
        keep = jnp.zeros((rows.shape[0], (n + short) // block), jnp.int32)

    def one(rows, gram, keep):
        damped, alive = _driver.regularize(gram, damping)
        factor, healthy = inverse_factor(damped)
        columns = jnp.where(alive[:, None], rows.T, 0.0)
        columns = jnp.pad(columns, [(0, short), (0, 0)])
        factor = (
            jnp.pad(factor, [(0, short), (0, short)])
            .at[n:, n:]
            .set(jnp.eye(short, dtype=gram.dtype))
        )
        solved, mask = _sweep(columns, factor, keep, n, n_m, block)
        return solved[:n].T, mask[:n].T, healthy

    solved, mask, healthy = _driver.over_groups(one, rows, gram, keep)
    return solved, mask, jnp.all(healthy)


def inverse_factor(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Upper U with ``U^T U = gram^-1``, and whether the Gram is positive definite.

    Factoring the Gram from its last row up gives the inverse of U, so the inverse of the Gram
    itself is never formed.
    """
    lower, healthy = _driver.factor(gram[::-1, ::-1])
    inverse = lax.linalg.triangular_solve(
        lower, jnp.eye(gram.shape[0], dtype=gram.dtype), left_side=True, lower=True
    )
    return inverse[::-1, ::-1], healthy


def _sweep(columns, factor, keep, n, n_m, block):
    """All blocks from left to right; weights are (fan-in, outputs), so a column is contiguous.

    A column's error reaches the rest of its strip at once, the rest of the block after the strip,
    and later blocks after the block.
    """
    total, outputs = columns.shape
    strip = _strip(block, 1 if n_m is None else n_m[1])
    group = strip if n_m is None else n_m[1]
    real = jnp.arange(total) < n

    def scores_of(weights, diagonal):
        return jnp.square(weights / diagonal[:, None])

    def do_block(b, state):
        columns, mask = state
        at = b * block
        square = lax.dynamic_slice(factor, (at, at), (block, block))
        weights = lax.dynamic_slice(columns, (at, 0), (block, outputs))
        kept = jnp.zeros_like(weights, bool)
        if n_m is None:
            here = lax.dynamic_slice(real, (at,), (block,))
            scores = jnp.where(here[:, None], scores_of(weights, jnp.diagonal(square)), -1.0)
            kept = _topk.top([scores], [keep[b]]).masks[0]

        def do_strip(s, state):
            weights, kept, errors = state
            start = s * strip
            corner = lax.dynamic_slice(square, (start, start), (strip, strip))
            part = lax.dynamic_slice(weights, (start, 0), (strip, outputs))
            chosen = lax.dynamic_slice(kept, (start, 0), (strip, outputs))

            def do_group(g, state):
                part, chosen, wrong = state
                first = g * group
                if n_m is not None:
                    now = lax.dynamic_slice(part, (first, 0), (group, outputs))
                    diagonal = lax.dynamic_slice(jnp.diagonal(corner), (first,), (group,))
                    best = mask_n_m(scores_of(now, diagonal), *n_m, axis=0)
                    chosen = lax.dynamic_update_slice(chosen, best, (first, 0))

                def do_column(j, state):
                    part, wrong = state
                    i = first + j
                    error = jnp.where(chosen[i], 0.0, part[i] / corner[i, i])
                    return part - corner[i][:, None] * error[None, :], wrong.at[i].set(error)

                part, wrong = lax.fori_loop(0, group, do_column, (part, wrong))
                return part, chosen, wrong

            begin = (part, chosen, jnp.zeros_like(part))
            part, chosen, wrong = lax.fori_loop(0, strip // group, do_group, begin)
            weights = lax.dynamic_update_slice(
                _corrected(weights, square, start, strip, wrong), part, (start, 0)
            )
            kept = lax.dynamic_update_slice(kept, chosen, (start, 0))
            return weights, kept, lax.dynamic_update_slice(errors, wrong, (start, 0))

        begin = (weights, kept, jnp.zeros_like(weights))
        weights, kept, errors = lax.fori_loop(0, block // strip, do_strip, begin)
        columns = _corrected(columns, factor, at, block, errors)
        columns = lax.dynamic_update_slice(columns, jnp.where(kept, weights, 0.0), (at, 0))
        return columns, lax.dynamic_update_slice(mask, kept, (at, 0))

    state = (columns, jnp.zeros_like(columns, bool))
    return lax.fori_loop(0, total // block, do_block, state)


def _corrected(columns, factor, at, size, errors):
    """Columns after those at ``at``, corrected for the errors made in these."""
    later = lax.dynamic_slice(factor, (at, 0), (size, factor.shape[1]))
    later = jnp.where(jnp.arange(factor.shape[1]) >= at + size, later, 0.0)
    return columns - jnp.matmul(later.T, errors, precision=lax.Precision.HIGHEST)


def _strip(block: int, group: int) -> int:
    """The widest part of a block, in whole groups, that stays narrow."""
    widths = [w for w in range(group, max(_STRIP, group) + 1, group) if block % w == 0]
    return widths[-1]
