"""Gradual pruning that regrows as it goes."""

import jax
import jax.numpy as jnp
import optax

from jaxprune import _checks
from jaxprune._tree import kernels
from jaxprune._typing import Allocation, Masking, Masks, Prunable, Saliency, Trigger
from jaxprune.allocation import allocate_global
from jaxprune.masks import bury, mask_topk
from jaxprune.saliency.weights import gradient_magnitude, magnitude
from jaxprune.transforms._driver import masked_training, starting_masks
from jaxprune.transforms.regrow import exchange


def granet(
    inner: optax.GradientTransformation,
    sparsity: float | optax.Schedule,
    *,
    when: Trigger,
    key: jax.Array,
    regeneration: float = 0.5,
    drop: Saliency = magnitude,
    grow: Saliency = gradient_magnitude,
    allocate: Allocation = allocate_global,
    mask: Masking = mask_topk,
    prunable: Prunable = kernels,
    masks: Masks | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Gradual pruning with zero-cost neuroregeneration.

    At every update t at which ``when`` fires, leaves shrink to the counts k of sparsity S(t); then
    in each leaf a constant share r of its k weights, the lowest under ``drop``, make room for as
    many of all others, the highest under ``grow``:

    .. math:: |m| = \operatorname{allocate}(s, S(t)), \quad |m \setminus m_{old}| \le r\,|m|

    Grown weights start at zero, with the optimizer state of a fresh start. Steps, exact zeros and
    NaN are as in ``jp.prune_gradually``.

    Args:
      inner: an optax optimizer whose state can be matched to single weights.
      sparsity: fraction of all governed weights removed, a number or an ``optax.Schedule``; the
        paper uses the cubic schedule.
      when: the updates at which masks change.
      key: a PRNG key for random criteria.
      regeneration: r, the share of the kept weights that is replaced.
      drop: ``(params, grads, key=) -> scores`` that rank the kept weights.
      grow: ``(params, grads, key=) -> scores`` that rank the others; it sees the dense gradient.
      allocate: ``(scores, sparsity) -> counts``, from the scores of ``drop``.
      mask: ``(scores, counts) -> masks``.
      prunable: ``(path, leaf) -> bool``, which leaves are governed.
      masks: masks to start from; all kept by default.

    Returns:
      A transform whose state has ``masks``.

    Raises:
      ValueError: for numbers outside [0, 1]; else as ``jp.prune_and_grow``.

    Example:
      >>> import jax, optax, jaxprune as jp
      >>> tx = jp.granet(optax.adam(1e-3), jp.cubic_sparsity(0.9, 800), when=jp.every(50, end=800),
      ...                key=jax.random.key(0))

    Reference:
      Liu et al. Sparse Training via Boosting Pruning Plasticity with Neuroregeneration, 2021.
    """
    schedule = _checks.as_fraction(sparsity, "sparsity")
    _checks.check_sparsity(regeneration, "regeneration")
    _checks.check_steps(allocate=allocate, mask=mask, prunable=prunable)
    _checks.check_key(key)

    def propose(old, step, drops, grows):
        wanted = jnp.clip(jnp.asarray(schedule(step), jnp.float32), 0.0, 1.0)
        keep = allocate(bury(old, drops), wanted)
        new, bad = exchange(old, drops, grows, keep, regeneration, mask)
        return new, wanted, bad

    return masked_training(
        inner,
        propose,
        start=lambda params: (starting_masks(params, prunable, masks), 0.0),
        when=when,
        criteria={"drop": drop, "grow": grow},
        keys=lambda step: jax.random.split(jax.random.fold_in(key, step)),
        target=schedule,
        regrows=True,
    )
