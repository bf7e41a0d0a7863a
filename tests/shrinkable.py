"""What architectures for shrinking are made of: a case, random weights, inputs."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

KEY = jax.random.key(3)


class Case(NamedTuple):
    apply: Any
    params: Any
    args: tuple
    has_state: bool = False


def randomised(tree, seed=0):
    """Random numbers in every floating leaf; variances stay positive."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    rng, out = np.random.default_rng(seed), []
    for path, leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            is_shape = isinstance(leaf, jax.ShapeDtypeStruct)
            out.append(jnp.zeros(leaf.shape, leaf.dtype) if is_shape else leaf)
            continue
        values = rng.normal(size=leaf.shape) / np.sqrt(max(1, np.prod(leaf.shape[:-1])) ** 0.8)
        if "var" in jax.tree_util.keystr(path):
            values = np.abs(values) + 0.5
        wide = leaf.dtype == jnp.float64  # inputs are float32, whether x64 is on or not
        out.append(jnp.asarray(values, jnp.float32 if wide else leaf.dtype))
    return jax.tree.unflatten(structure, out)


def normal(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


IMAGE = normal(2, 8, 8, 2)
SEQUENCE = normal(2, 5, 4)
TOKENS = jnp.asarray(np.random.default_rng(2).integers(0, 9, (2, 5)))
