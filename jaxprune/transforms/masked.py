"""Training under fixed masks."""

from typing import NamedTuple

import optax

from jaxprune import _tree
from jaxprune._typing import Masks, Params
from jaxprune.transforms._driver import check_update, copy_masks, zeroing_updates


class MaskedParamsState(NamedTuple):
    """State of ``keep_params_masked``: bool ``masks`` like the parameters."""

    masks: Masks


def keep_params_masked(masks: Masks) -> optax.GradientTransformationExtraArgs:
    r"""The last link of a chain: pruned weights are exactly zero after every update.

    .. math:: u \leftarrow m \odot u - (1 - m) \odot w

    Args:
      masks: bool masks like the parameters, ``None`` where not governed; ``init`` copies them.

    Returns:
      A transform whose state has ``masks``.

    Raises:
      ValueError: from ``init``, if the masks do not fit the parameters; from ``update``, without
        params.
      TypeError: from ``init``, if a mask is not bool.

    Example:
      >>> import jax.numpy as jnp, optax, jaxprune as jp
      >>> masks = {"w": jnp.array([True, False])}
      >>> tx = optax.chain(optax.adamw(1e-3), jp.keep_params_masked(masks))

    Reference:
      Frankle, Carbin. The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks,
      2019.
    """

    def init(params: Params) -> MaskedParamsState:
        if not _tree.leaves_with_paths(params):
            return MaskedParamsState(params)
        _tree.check_masks(masks, params)
        return MaskedParamsState(copy_masks(masks))

    def update(updates, state, params=None, **extra):
        del extra
        check_update(updates, params)
        return zeroing_updates(updates, params, state.masks), state

    return optax.GradientTransformationExtraArgs(init, update)
