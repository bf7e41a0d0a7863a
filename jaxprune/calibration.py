"""What the matmuls see: fan-in axes, input norms and Gram matrices, read from the jaxpr."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune import _checks, _jaxpr, _placement, _rows, _trail, _tree, _walk
from jaxprune._typing import Params, Prunable, PyTree
from jaxprune._walk import Meeting, Use

_SYMMETRIC_FROM = 512  # below this fan-in one product beats the blocks of the upper triangle


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["matrix"],
    meta_fields=["axes", "stack"],
)
@dataclasses.dataclass(frozen=True)
class Gram:
    r"""The inputs of a weight, as :math:`X^\top X` over its fan-in.

    ``np.asarray(gram)`` is the matrix.

    Attributes:
      matrix: float32 or wider, (n, n) for a fan-in of n, with one leading axis for every axis of
        ``stack``.
      axes: the weight's fan-in axes, flattened in this order.
      stack: axes along which parts of the weight have inputs of their own: layers that a scan
        stacked, experts, the outputs of a grouped convolution.

    Example:
      >>> import jax.numpy as jnp, numpy as np, jaxprune as jp
      >>> np.asarray(jp.Gram(jnp.eye(2), axes=(0,))).tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """

    matrix: Any
    axes: tuple[int, ...]
    stack: tuple[int, ...] = ()

    def __array__(self, dtype=None, copy=None):
        """The matrix as a NumPy array."""
        return np.array(self.matrix, dtype=dtype, copy=copy)

    @property
    def use(self) -> Use:
        """How the weight is read."""
        return Use(self.axes, self.stack, tuple(self.matrix.shape[: len(self.stack)]))


def fan_in_axes(apply: Callable[..., Any], params: Params, *args: Any) -> PyTree:
    """The axes that matmuls and convolutions contract, for every leaf that one of them consumes.

    Leaves are followed through casts, transposes, reshapes, broadcasts, slices and elementwise
    arithmetic, and into jit, remat, custom derivatives, cond, scan and while. Nothing is computed.

    Args:
      apply: ``apply(params, *args)``, the model.
      params: a tree of arrays or ``jax.ShapeDtypeStruct``.
      *args: inputs, arrays or ``jax.ShapeDtypeStruct``.

    Returns:
      A tree like ``params``: a tuple of ints where a matmul consumes the leaf, else ``None``. It
      fits every ``axis=`` of the library.

    Raises:
      ValueError: if two matmuls contract a leaf over different axes.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> apply = lambda p, x: x @ p["w"] + p["b"][None, :]
      >>> jp.fan_in_axes(apply, {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}, jnp.ones((1, 3)))
      {'b': None, 'w': (0,)}
    """
    traced = _jaxpr.trace(apply, params, *args)
    uses, _ = find_uses(traced, set(range(len(traced.paths))))
    return _unflatten(params, {i: use.axes for i, use in uses.items()})


def matmul_weights(apply: Callable[..., Any], params: Params, *args: Any) -> Prunable:
    """A ``prunable`` predicate: the floating leaves that a matmul or convolution consumes.

    Args:
      apply: ``apply(params, *args)``, the model.
      params: a tree of arrays or ``jax.ShapeDtypeStruct``.
      *args: inputs, arrays or ``jax.ShapeDtypeStruct``.

    Returns:
      ``prunable(path, leaf) -> bool``.

    Raises:
      ValueError: if two matmuls contract a leaf over different axes.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> apply = lambda p, x: x @ p["w"] * p["s"]
      >>> params = {"w": jnp.ones((3, 2)), "s": jnp.ones((1, 2))}
      >>> jp.select(params, jp.matmul_weights(apply, params, jnp.ones((1, 3))))["s"] is None
      True
    """
    traced = _jaxpr.trace(apply, params, *args)
    uses, _ = find_uses(traced, set(range(len(traced.paths))))
    paths = {traced.paths[i] for i in uses}

    def prunable(path: Any, leaf: Any) -> bool:
        dtype = getattr(leaf, "dtype", None)
        floating = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
        return floating and _tree.path_str(path) in paths

    prunable.__name__ = "matmul_weights"
    return prunable


def input_norms(
    apply: Callable[..., Any],
    params: Params,
    batches: Iterable[Any],
    *,
    prunable: Prunable = _tree.kernels,
) -> PyTree:
    r"""L2 norms of the input features of every governed weight, over all batches.

    .. math:: \|x_j\|_2 = \sqrt{\textstyle\sum_t x_{tj}^2}

    Batches stream through one compiled function: memory is one batch's activations.

    Args:
      apply: ``apply(params, *batch)``, the model.
      params: a tree of arrays.
      batches: an iterable; a tuple is splatted into ``apply``, anything else is one argument.
      prunable: which leaves are governed.

    Returns:
      float32 (or wider) arrays like ``params``: of the weight's rank, size one on output axes, one
      norm per part on axes whose parts have inputs of their own (stacked layers, conv groups);
      ``None`` where not governed.

    Raises:
      ValueError: if no matmul consumes a governed leaf, two contract it over different axes, or
        there is no batch.
      TypeError: if ``batches`` is one array.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> x = jnp.array([[3.0, 1.0], [4.0, 0.0]])
      >>> jp.input_norms(lambda p, x: x @ p["w"], {"w": jnp.ones((2, 5))}, [x])["w"].tolist()
      [[5.0], [1.0]]

    Reference:
      Sun, Liu, Bair, Kolter. A Simple and Effective Pruning Approach for Large Language Models,
      2024.
    """
    squares, uses = _stream(apply, params, batches, prunable, squares_of)

    def root(leaf, total, use):
        return _rows.to_features(jnp.sqrt(total), leaf.shape, use)

    return _tree.map_governed(
        root, _tree.select(params, prunable), _unflatten(params, squares), _unflatten(params, uses)
    )


def input_grams(
    apply: Callable[..., Any],
    params: Params,
    batches: Iterable[Any],
    *,
    prunable: Prunable = _tree.kernels,
) -> PyTree:
    r"""Gram matrices of the inputs of every governed weight, over all batches.

    .. math:: G = \textstyle\sum_t x_t x_t^\top

    A convolution's inputs are its patches. A weight that is used several times, or at every turn of
    a loop, adds up; layers stacked by scan give one matrix each. Batches stream through one
    compiled function: memory is one batch and the matrices. Batches sharded over a data axis
    are summed over it by the partitioner.

    Args:
      apply: ``apply(params, *batch)``, the model.
      params: a tree of arrays.
      batches: an iterable; a tuple is splatted into ``apply``, anything else is one argument.
      prunable: which leaves are governed.

    Returns:
      ``jp.Gram`` leaves like ``params``, float32 or wider; ``None`` where not governed.

    Raises:
      ValueError: if no matmul consumes a governed leaf, two contract it over different axes, or
        there is no batch.
      TypeError: if ``batches`` is one array.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> apply = lambda p, x: x @ p["w"]
      >>> gram = jp.input_grams(apply, {"w": jnp.ones((2, 5))}, [jnp.ones((3, 2))])["w"]
      >>> gram.matrix.tolist(), gram.axes
      ([[3.0, 3.0], [3.0, 3.0]], (0,))
    """
    matrices, uses = _stream(apply, params, batches, prunable, gram_of)
    grams = {i: Gram(m, uses[i].axes, uses[i].stack) for i, m in matrices.items()}
    return _unflatten(params, grams)


def squares_of(x: jax.Array) -> jax.Array:
    """(*groups, rows, n) to the sums of squares (*groups, n)."""
    return jnp.sum(jnp.square(x), -2)


def gram_of(x: jax.Array) -> jax.Array:
    """(*groups, rows, n) to (*groups, n, n); a wide one by the blocks of its upper triangle."""
    return _placement.call_in_auto(_gram_of, x, small=True)


def product(x: jax.Array, y: jax.Array) -> jax.Array:
    """``X^T Y`` over rows, group by group."""
    return jnp.einsum("...ri,...rj->...ij", x, y, precision=lax.Precision.HIGHEST)


def _gram_of(x: jax.Array) -> jax.Array:
    n = x.shape[-1]
    if n < _SYMMETRIC_FROM:
        return product(x, x)
    edges = [n * i // 4 for i in range(5)]
    upper = [
        jnp.pad(product(x[..., a:b], x[..., a:]), [(0, 0)] * (x.ndim - 1) + [(a, 0)])
        for a, b in itertools.pairwise(edges)
    ]
    upper_rows = jnp.concatenate(upper, -2)
    return jnp.triu(upper_rows) + jnp.matrix_transpose(jnp.triu(upper_rows, 1))


def find_uses(traced: _jaxpr.Traced, leaves: set[int]) -> tuple[dict[int, Use], dict[int, str]]:
    """How matmuls read each of ``leaves`` (numbers of inputs), and where other leaves were lost."""
    lost: dict[int, str] = {}
    uses: dict[int, Use] = {}

    def record(carry, meeting: Meeting):
        before = uses.setdefault(meeting.leaf, meeting.use)
        check_same_use(traced.paths[meeting.leaf], before, meeting.use)
        return carry

    def run(values):
        return _walk.evaluate(
            traced.jaxpr, values, trails_of(traced, leaves), record, (), lost
        ).values

    jax.eval_shape(run, [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in traced.jaxpr.in_avals])
    return uses, lost


def check_same_use(path: str, before: Use, now: Use) -> None:
    """Raise unless two matmuls read the leaf in the same way."""
    if before != now:
        raise ValueError(
            f"{path}: one matmul contracts axes {before.axes} (stacked {before.stack}), another "
            f"{now.axes} (stacked {now.stack}); leave this leaf out with prunable"
        )


def check_used(traced: _jaxpr.Traced, leaves: set[int], uses: dict[int, Use], lost) -> None:
    """Raise with the path of the first leaf that no matmul consumes."""
    for i in sorted(leaves):
        if i not in uses:
            where = f"; it is lost at {lost[i]}" if i in lost else ""
            raise ValueError(
                f"{traced.paths[i]}: selected for pruning, but no matmul or convolution consumes it"
                f"{where}; select with prunable=jp.matmul_weights(apply, params, x)"
            )


def trails_of(traced: _jaxpr.Traced, leaves: set[int]) -> list[_trail.Trail | None]:
    """The trails of the inputs of a traced model: those numbered in ``leaves`` have one."""
    return [
        _trail.start(i, aval.shape) if i in leaves else None
        for i, aval in enumerate(traced.jaxpr.in_avals)
    ]


def add_at(total: jax.Array, meeting: Meeting, part: jax.Array) -> jax.Array:
    """``total`` with ``part``, the statistic of a meeting, added where the meeting belongs."""
    sizes = [
        n if at is None else 1 for n, at in zip(meeting.use.groups, meeting.taken, strict=True)
    ]
    rest = total.shape[len(sizes) :]
    zero = jnp.zeros((), jnp.int32)
    starts = [zero if at is None else jnp.asarray(at, jnp.int32) for at in meeting.taken]
    starts += [zero] * len(rest)
    before = lax.dynamic_slice(total, starts, [*sizes, *rest])
    return lax.dynamic_update_slice(
        total, before + part.reshape(before.shape).astype(total.dtype), starts
    )


def governed_leaves(params: Params, prunable: Prunable) -> set[int]:
    """The numbers of the governed leaves among all leaves; raises if there is none."""
    selected = _tree.leaves_with_paths(_tree.select(params, prunable))
    present = [leaf for _, leaf in _tree.leaves_with_paths(params)]
    kept = [leaf for (_, leaf), own in zip(selected, present, strict=True) if own is not None]
    return {i for i, leaf in enumerate(kept) if leaf is not None}


def as_args(batch: Any) -> tuple[Any, ...]:
    """The arguments that an element of ``batches`` stands for."""
    return batch if isinstance(batch, tuple) else (batch,)


def _stream(apply, params, batches, prunable, statistic):
    """The statistic of every governed leaf, summed over batches, and how the leaves are used."""
    _checks.check_apply(apply)
    _checks.check_batches(batches)
    leaves = governed_leaves(params, prunable)
    uses: dict[int, Use] = {}

    @partial(jax.jit, donate_argnums=0)
    def add(totals, params, args):
        traced = _jaxpr.trace(apply, params, *args)

        def watch(totals, meeting: Meeting):
            part = statistic(meeting.x)
            return {**totals, meeting.leaf: add_at(totals[meeting.leaf], meeting, part)}

        values = jax.tree.leaves((params, args))
        return _walk.evaluate(traced.jaxpr, values, trails_of(traced, leaves), watch, totals).carry

    totals: dict[int, jax.Array] = {}
    for batch in batches:
        args = as_args(batch)
        if not uses:
            traced = _jaxpr.trace(apply, params, *args)
            uses, lost = find_uses(traced, leaves)
            check_used(traced, leaves, uses, lost)
            shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
            totals = {
                i: jnp.zeros(_statistic_shape(statistic, shapes[i], use), _wide(traced, i))
                for i, use in uses.items()
            }
        totals = add(totals, params, args)
    if not uses:
        raise ValueError("no batches to calibrate on; an exhausted generator gives none either")
    return totals, uses


def _statistic_shape(statistic, shape, use):
    n = _rows.fan_in(shape, use)
    return (*use.groups, *((n, n) if statistic is gram_of else (n,)))


def _wide(traced, i):
    return _walk.wide_dtype(traced.jaxpr.in_avals[i].dtype)


def _unflatten(params: Params, values: dict[int, Any]) -> PyTree:
    """A tree like ``params`` of the values for numbered leaves, ``None`` elsewhere."""
    count = len(jax.tree.leaves(params))
    return _tree.unflatten(params, [values.get(i) for i in range(count)])
