"""The words of the library as types: four trees and four protocols.

Every tree here has the structure of the parameters it belongs to; a leaf that is not
governed is ``None``.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax

PyTree = Any
Params = Any
"""A tree of arrays."""
Scores = Any
"""Like the parameters: floating, larger means more important, ``None`` where not governed."""
Counts = Any
"""Like the parameters: an int32 scalar per leaf, the number of weights to keep."""
Masks = Any
"""Like the parameters: bool, ``True`` means kept."""

Prunable = Callable[[str, Any], bool]
"""``prunable(path, leaf)`` says whether the leaf at ``path`` ("a/b/kernel") is governed."""


class Saliency(Protocol):
    """Scores from parameters and, where the criterion needs them, gradients."""

    def __call__(
        self, params: Params, grads: Params | None = None, *, key: jax.Array | None = None
    ) -> Scores:
        """Return scores for ``params``."""
        ...


class Allocation(Protocol):
    """How many weights each leaf keeps at a given sparsity, which may be traced."""

    def __call__(self, scores: Scores, sparsity: Any) -> Counts:
        """Return counts for ``scores``."""
        ...


class Masking(Protocol):
    """Masks that keep ``keep`` weights of each leaf."""

    def __call__(self, scores: Scores, keep: Counts) -> Masks:
        """Return masks for ``scores``."""
        ...


class Trigger(Protocol):
    """Whether something happens at a step."""

    def __call__(self, step: Any) -> Any:
        """Return a bool, possibly traced."""
        ...


class Layerwise(Protocol):
    """Weights and masks together, from what each layer's inputs look like."""

    def __call__(
        self,
        params: Params,
        grams: PyTree,
        sparsity: Any = None,
        *,
        n_m: tuple[int, int] | None = None,
    ) -> tuple[Params, Masks]:
        """Return corrected parameters and masks."""
        ...
