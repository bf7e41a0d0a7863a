"""Sparsity over time, and when to act on it."""

import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxprune import _checks
from jaxprune._typing import Trigger


def cubic_sparsity(
    final: float, steps: int, *, begin: int = 0, initial: float = 0.0
) -> optax.Schedule:
    r"""Sparsity that rises fast at first, while there is much to remove, and slowly at the end.

    .. math:: s(t) = s_f + (s_i - s_f) \left(1 - \frac{t - t_0}{T}\right)^3

    Args:
      final: sparsity reached at ``begin + steps`` and kept from then on.
      steps: length of the rise, in updates, at least 1.
      begin: the update at which it starts.
      initial: sparsity until then.

    Returns:
      An ``optax.Schedule``: the sparsity at an update, counted from 0.

    Raises:
      ValueError: for sparsities outside [0, 1], or fewer than 1 step.

    Example:
      >>> import jaxprune as jp
      >>> float(jp.cubic_sparsity(0.75, 100)(100))
      0.75

    Reference:
      Zhu, Gupta. To prune, or not to prune: exploring the efficacy of pruning for model
      compression, 2017.
    """
    _checks.check_sparsity(final, "final")
    _checks.check_sparsity(initial, "initial")
    _checks.check_whole(steps=steps, begin=begin)
    if steps < 1:
        raise ValueError(f"steps is {steps}; a rise takes at least 1 step")
    if begin < 0:
        raise ValueError(f"begin is {begin}; updates are counted from 0")
    return optax.polynomial_schedule(initial, final, 3, steps, begin)


def every(n: int, *, begin: int = 0, end: int | None = None) -> Trigger:
    """Fires at ``begin``, every ``n`` updates after it, and at ``end``, so that nothing is missed.

    Args:
      n: updates between two firings, at least 1.
      begin: the first update at which it fires, counted from 0.
      end: the last; without it, it goes on for ever.

    Returns:
      ``trigger(step) -> bool``, traced if ``step`` is.

    Raises:
      ValueError: if ``n`` is less than 1, ``begin`` negative, or ``end`` before ``begin``.
      TypeError: for a number that is not whole.

    Example:
      >>> import jaxprune as jp
      >>> [t for t in range(12) if jp.every(4, begin=1, end=10)(t)]
      [1, 5, 9, 10]
    """
    _checks.check_whole(n=n, begin=begin, end=end)
    if n < 1:
        raise ValueError(f"every({n}): n counts updates between two firings and is at least 1")
    if begin < 0:
        raise ValueError(f"every: begin is {begin}; updates are counted from 0")
    if end is not None and end < begin:
        raise ValueError(f"every: end {end} comes before begin {begin}")

    def trigger(step):
        since = jnp.asarray(step - begin)
        fires = (step >= begin) & (lax.rem(since, np.asarray(n, since.dtype)) == 0)
        return fires if end is None else (fires & (step <= end)) | (step == end)

    return trigger
