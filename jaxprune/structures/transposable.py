"""Transposable N:M: n of every m along both axes of a matrix, so that W and its transpose fit."""

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _placement, _tree
from jaxprune._typing import Masks, Scores
from jaxprune.masks import axis_tree, check_scores, resolve_axes
from jaxprune.structures.n_m import check_divides, check_pattern


def mask_n_m_transposable(scores: Scores, n: int, m: int, *, axes: Any = (-2, -1)) -> Masks:
    r"""Keep ``n`` of each ``m`` along both of two axes, so that the backward pass is sparse too.

    In every m x m block B,

    .. math:: \max_M \sum_{ij} M_{ij} s_{ij}, \quad \sum_i M_{ij} = \sum_j M_{ij} = n

    The best of all 90 patterns for 2:4 (ties to the first in lexicographic order). For other n:m
    cells are chosen greedily while their row and column have room, which is worth at least half of
    the best; where that leaves a row and a column one short, the exchange of one chosen cell for
    two that costs least completes them.

    Args:
      scores: a tree of floating arrays, ``None`` where not governed. NaN ranks last.
      n: kept of each m along either axis.
      m: size of a block along either axis; divides both.
      axes: two axes, or a tree of pairs.

    Returns:
      Bool masks like ``scores``.

    Raises:
      ValueError: if n > m, m does not divide an axis, or there are not two axes.
      TypeError: if a score is not floating.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> mask = jp.mask_n_m_transposable({"w": jnp.eye(4)[::-1]}, 2, 4)["w"]
      >>> mask.sum(0).tolist(), mask.sum(1).tolist(), bool(mask[0, 3])
      ([2, 2, 2, 2], [2, 2, 2, 2], True)

    Reference:
      Hubara, Chmiel, Island, Banner, Naor, Soudry. Accelerated Sparse Neural Training: A Provable
      and Efficient Method to Find N:M Transposable Masks, 2021.
    """
    check_pattern(n, m)
    check_scores(scores)
    best = _best_of_patterns if (n, m) == (2, 4) else _greedy

    def mask(path, leaf, plane):
        pair = resolve_axes(path, leaf, plane)
        if len(pair) != 2:
            raise ValueError(f"{path}: axes {pair} are not two; give the rows and the columns")
        for axis in pair:
            check_divides(path, leaf, (axis,), m)

        def tiles(leaf):
            wide = jnp.moveaxis(_tree.widen(leaf), pair, (-2, -1))
            *rest, rows, columns = wide.shape
            split = wide.reshape(*rest, rows // m, m, columns // m, m)
            cells = [[split[..., i, :, j] for j in range(m)] for i in range(m)]
            chosen = best(cells, n)
            rebuilt = jnp.stack([jnp.stack(row, -1) for row in chosen], -3)
            return jnp.moveaxis(rebuilt.reshape(wide.shape), (-2, -1), pair)

        return _placement.call_in_auto(tiles, leaf)

    return _tree.map_governed_with_path(mask, scores, axis_tree(scores, axes))


Cells = Sequence[Sequence[jax.Array]]
"""A block cell by cell, each an array over all blocks."""

_PAIRS = list(combinations(range(4), 2))
_PATTERNS = [
    rows
    for rows in product(range(len(_PAIRS)), repeat=4)
    if all(sum(column in _PAIRS[row] for row in rows) == 2 for column in range(4))
]


def _best_of_patterns(cells: Cells, n: int) -> Cells:
    """2:4 exactly: four rows of two, two in every column."""
    del n
    rows = [
        [row[a] + row[b] for a, b in _PAIRS]
        for row in ([_finite_or_last(cell) for cell in row] for row in cells)
    ]
    halves = list(product(range(len(_PAIRS)), repeat=2))
    upper = {(p, q): rows[0][p] + rows[1][q] for p, q in halves}
    lower = {(p, q): rows[2][p] + rows[3][q] for p, q in halves}
    best = jnp.full_like(upper[0, 0], -jnp.inf)
    code = jnp.zeros_like(best, dtype=jnp.int32)
    for first, second, third, fourth in _PATTERNS:
        total = upper[first, second] + lower[third, fourth]
        pairs = enumerate(_PAIRS[p] for p in (first, second, third, fourth))
        bits = np.int32(sum(1 << (4 * row + column) for row, pair in pairs for column in pair))
        better = total > best
        best, code = jnp.where(better, total, best), jnp.where(better, bits, code)
    return [[(code >> np.int32(4 * r + c)) % 2 == 1 for c in range(4)] for r in range(4)]


def _greedy(cells: Cells, n: int) -> Cells:
    """One cell more at each step, until every row and column has n."""
    m = len(cells)
    block = jnp.stack([jnp.stack([_finite_or_last(c) for c in row], -1) for row in cells], -2)
    shape = block.shape
    block = block.reshape(-1, m, m)
    none = jnp.asarray(-jnp.inf, block.dtype)

    def step(_, chosen):
        open_rows = jnp.sum(chosen, -1, dtype=jnp.int32) < n
        open_columns = jnp.sum(chosen, -2, dtype=jnp.int32) < n
        free = open_rows[:, :, None] & open_columns[:, None, :] & ~chosen
        add = _largest(jnp.where(free, block, none)) & free
        # No cell is free: a chosen one gives way to its row's and its column's.
        row, column = _first(open_rows)[:, :, None], _first(open_columns)[:, None, :]
        in_row = jnp.sum(jnp.where(row, block, 0), -2, keepdims=True)
        in_column = jnp.sum(jnp.where(column, block, 0), -1, keepdims=True)
        row_has = jnp.any(row & chosen, -2, keepdims=True)
        column_has = jnp.any(column & chosen, -1, keepdims=True)
        movable = chosen & ~row_has & ~column_has
        leave = _largest(jnp.where(movable, in_row + in_column - block, none)) & movable
        enter = (row & jnp.any(leave, -2, keepdims=True)) | (
            column & jnp.any(leave, -1, keepdims=True)
        )
        stuck = ~jnp.any(free, (-2, -1), keepdims=True)
        return jnp.where(stuck, (chosen & ~leave) | enter, chosen | add)

    # Nothing is NaN here: all False, with the varying axes that a loop under shard_map needs.
    chosen = jax.lax.fori_loop(0, n * m, step, jnp.isnan(block)).reshape(shape)
    return [[chosen[..., i, j] for j in range(m)] for i in range(m)]


def _finite_or_last(cell: jax.Array) -> jax.Array:
    """Sums of four, and differences of sums, stay finite."""
    most = np.asarray(np.finfo(cell.dtype).max / 16, cell.dtype)
    return jnp.where(jnp.isnan(cell), -most, jnp.clip(cell, -most, most))


def _largest(block: jax.Array) -> jax.Array:
    """True at the first of the largest cells of each block."""
    flat = block.reshape(block.shape[0], -1)
    place = jnp.argmax(flat, -1, keepdims=True)
    return (jax.lax.broadcasted_iota(place.dtype, flat.shape, 1) == place).reshape(block.shape)


def _first(line: jax.Array) -> jax.Array:
    """True at the first True."""
    return line & (jnp.cumsum(line, -1, dtype=jnp.int32) == 1)
