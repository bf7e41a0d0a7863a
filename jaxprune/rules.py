"""A different treatment for every path: rules as combinators over the protocols."""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _checks, _paths, _tree
from jaxprune._typing import Allocation, Counts, Masking, Masks, Params, PyTree, Saliency, Scores
from jaxprune.allocation import allocate_uniform
from jaxprune.masks import check_scores, mask_topk
from jaxprune.saliency.accumulate import Accumulated, check_criterion
from jaxprune.saliency.weights import magnitude

Share = float | Allocation | None
"""What a path gets: its own sparsity, an allocation, or nothing removed."""


def allocate_by_path(
    rules: Mapping[str, Share], *, default: Share = allocate_uniform
) -> Allocation:
    r"""An allocation that treats the paths that match a pattern in their own way.

    .. math:: S_i = \min(s_r, S) \quad \text{for the first rule } r \text{ that matches path } i

    The leaves of one rule are allocated together, apart from the others: the total follows from
    the rules, and ``jp.summarize`` shows what it came to.

    Args:
      rules: ``{pattern: share}``; patterns are searched (``re.search``) in paths such as
        "encoder/dense_0/kernel", and the first that matches wins. A share is a number, the ceiling
        of these leaves under a schedule; an allocation, which ranks these leaves among themselves;
        or ``None``, nothing removed.
      default: the share of leaves that match no pattern.

    Returns:
      ``allocate(scores, sparsity) -> counts``.

    Raises:
      ValueError: for a number outside [0, 1]; from the allocation, for a rule that matches no
        governed leaf, or only leaves that earlier rules take.
      TypeError: if a share is none of the three, or ``rules`` no mapping.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> allocate = jp.allocate_by_path({"head": None, "mlp": 0.5})
      >>> keep = allocate({"head": jnp.ones(8), "mlp": jnp.ones(8), "conv": jnp.ones(8)}, 0.75)
      >>> int(keep["head"]), int(keep["mlp"]), int(keep["conv"])
      (8, 4, 2)
    """
    for pattern, share in (*_items(rules), ("default", default)):
        if callable(share):
            _checks.check_step("allocate", share, f"rule {pattern!r}")
        elif share is not None:
            _check_number(pattern, share, "a sparsity, an allocation, or None")
            _checks.check_sparsity(share, f"{pattern!r}: sparsity")
    return partial(_allocate, rules=dict(rules), default=default)


def mask_by_path(rules: Mapping[str, Masking], *, default: Masking = mask_topk) -> Masking:
    r"""A masking that gives the paths that match a pattern a structure of their own.

    .. math:: m_i = \operatorname{mask}_r(s_i, k_i) \quad \text{for the first rule } r
      \text{ that matches path } i

    Args:
      rules: ``{pattern: masking}``; patterns are searched in paths, the first that matches wins.
      default: the masking of leaves that match no pattern.

    Returns:
      ``mask(scores, keep) -> masks``.

    Raises:
      TypeError: if a rule is no masking, or ``rules`` no mapping.
      ValueError: from the masking, for a rule that matches no governed leaf, or only leaves that
        earlier rules take.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> mask = jp.mask_by_path({"attention": jp.gradual_n_m(2, 4, axis=0)})
      >>> scores = {"attention": jnp.arange(4.0), "mlp": jnp.arange(4.0)}
      >>> mask(scores, {"attention": 2, "mlp": 1})["mlp"].tolist()
      [False, False, False, True]
    """
    for pattern, rule in (*_items(rules), ("default", default)):
        _checks.check_step("mask", rule, f"rule {pattern!r}")
    return partial(_mask, rules=dict(rules), default=default)


def scale_by_path(
    rules: Mapping[str, float], *, saliency: Any = magnitude, default: float = 1.0
) -> Any:
    r"""A saliency whose scores count more or less, by path: for allocations that compare leaves.

    .. math:: s_i \leftarrow c_r s_i \quad \text{for the first rule } r \text{ that matches path } i

    Args:
      rules: ``{pattern: factor}``; patterns are searched in paths, the first that matches wins.
      saliency: what is scaled, with or without a memory.
      default: the factor of leaves that match no pattern.

    Returns:
      ``saliency(params, grads, key=) -> scores``, in float32 or wider; with a memory if it has one.

    Raises:
      ValueError: for a factor that is not a positive number; from the saliency, for a rule that
        matches no governed leaf, or only leaves that earlier rules take.
      TypeError: if a factor is no number, or ``rules`` no mapping.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> saliency = jp.scale_by_path({"head": 2.0})
      >>> saliency({"head": jnp.ones(1), "mlp": jnp.ones(1)})["head"].tolist()
      [2.0]
    """
    for pattern, factor in (*_items(rules), ("default", default)):
        _check_number(pattern, factor, "a positive number")
        if not (factor > 0 and math.isfinite(factor)):
            raise ValueError(f"{pattern!r}: factor is {factor}; give a positive number")
    check_criterion(saliency)
    scale = partial(_scale, rules=dict(rules), default=default)
    if not isinstance(saliency, Accumulated):
        return partial(_scaled_saliency, saliency=saliency, scale=scale)

    def update(params, grads, memory, *, key=None):
        scores, memory = saliency.update(params, grads, memory, key=key)
        return scale(scores), memory

    return Accumulated(saliency.init, update)


def _allocate(
    scores: Scores, sparsity: Any, *, rules: Mapping[str, Share], default: Share
) -> Counts:
    def share(part: Scores, rule: Share) -> Counts:
        if rule is None:
            return _tree.map_governed(lambda leaf: jnp.asarray(leaf.size, jnp.int32), part)
        if callable(rule):
            return rule(part, sparsity)
        _checks.check_sparsity(sparsity)
        ceiling = np.float32(rule)
        return allocate_uniform(part, jnp.minimum(ceiling, jnp.asarray(sparsity, jnp.float32)))

    return _by_rule(share, rules, default, scores)


def _mask(scores: Scores, keep: Counts, *, rules: Mapping[str, Masking], default: Masking) -> Masks:
    check_scores(scores, keep)
    return _by_rule(lambda part, rule, k: rule(part, k), rules, default, scores, keep)


def _scaled_saliency(
    params: Params,
    grads: Params | None = None,
    *,
    key: jax.Array | None = None,
    saliency: Saliency,
    scale: Callable[[Scores], Scores],
) -> Scores:
    return scale(saliency(params, grads, key=key))


def _scale(scores: Scores, *, rules: Mapping[str, float], default: float) -> Scores:
    def scaled(part, factor):
        def times(leaf):
            wide = _tree.widen(leaf)
            return wide * np.asarray(factor, wide.dtype)

        return _tree.map_governed(times, part)

    return _by_rule(scaled, rules, default, scores)


def _by_rule(
    f: Callable[..., PyTree], rules: Mapping[str, Any], default: Any, tree: PyTree, *rest: PyTree
) -> PyTree:
    """``f(part, rule, *parts)`` for the leaves of each rule; one tree from all results."""
    taken = _paths.match(tree, rules)
    result = _tree.map_governed(lambda _: None, tree)
    for pattern in dict.fromkeys(taken.values()):
        here = partial(_where, taken=taken, pattern=pattern)
        part = _tree.map_governed_with_path(here, tree)
        parts = [_tree.map_governed(lambda _, leaf: leaf, part, other) for other in rest]
        found = f(part, default if pattern is None else rules[pattern], *parts)
        result = jax.tree.map(
            lambda a, b: b if a is None else a, result, found, is_leaf=_tree.is_none
        )
    return result


def _where(path: str, leaf: Any, *, taken: Mapping[str, str | None], pattern: str | None) -> Any:
    return leaf if taken[path] == pattern else None


def _items(rules: Any) -> Iterable[tuple[str, Any]]:
    if not isinstance(rules, Mapping):
        raise TypeError(
            f"rules is {type(rules).__name__}, not a mapping; give {{pattern: value}}, such as "
            '{"head": None}'
        )
    return rules.items()


def _check_number(pattern: str, value: Any, remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"{pattern!r}: {value!r} is no rule here; give {remedy}")
