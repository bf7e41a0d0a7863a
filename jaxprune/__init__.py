"""jaxprune: scores to counts to masks to optax transforms to smaller models."""

from jaxprune._tree import kernels, matching, select

__all__ = ["kernels", "matching", "select"]
