"""Back to an earlier point of training, with the masks of a later one."""

import jax

from jaxprune import _tree
from jaxprune._typing import Masks, Params
from jaxprune.masks import apply_masks


def rewind(params: Params, early_params: Params, masks: Masks) -> Params:
    r"""Start the next lottery-ticket round: kept weights return to their values at step k.

    .. math:: w \leftarrow m \odot w_k

    Leaves that are not governed return too. Follow with a fresh optimizer that keeps the masks:
    ``jp.prune_gradually(..., masks=masks)`` or ``jp.keep_params_masked(masks)``.

    Args:
      params: the trained parameters; they say what the result looks like.
      early_params: the parameters at step k, like ``params``.
      masks: bool masks like ``params``.

    Returns:
      A tree like ``params``, zero where pruned.

    Raises:
      ValueError: if the trees, shapes or types differ.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> masks = {"w": jnp.array([True, False])}
      >>> jp.rewind({"w": jnp.ones(2)}, {"w": jnp.array([3.0, 4.0])}, masks)["w"].tolist()
      [3.0, 0.0]

    Reference:
      Frankle, Carbin. The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks,
      2019; Frankle, Dziugaite, Roy, Carbin. Linear Mode Connectivity and the Lottery Ticket
      Hypothesis, 2020.
    """
    _tree.check_like("early_params", early_params, params)

    def check(path, now, early):
        if now.dtype != early.dtype:
            raise ValueError(
                f"{path}: early_params has type {early.dtype}, params {now.dtype}; "
                "rewind to a checkpoint of the same training"
            )

    _tree.map_governed_with_path(check, params, early_params)
    return apply_masks(jax.tree.map(lambda _, early: early, params, early_params), masks)
