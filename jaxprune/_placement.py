"""How arrays lie on devices, under Auto and Explicit mesh axes alike."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def explicitly_sharded(x: Any) -> bool:
    """Whether the type of ``x`` says how it is sharded, so that reshapes of it are restricted."""
    sharding = getattr(jax.typeof(x), "sharding", None)
    return sharding is not None and any(part is not None for part in sharding.spec)


def typed_by_mesh(x: Any) -> bool:
    """Whether the type of ``x`` names mesh axes: explicit sharding, or the inside of shard_map."""
    kind = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)
    varies = getattr(kind, "vma", None) or getattr(manual, "varying", None)
    return bool(varies) or explicitly_sharded(x)


def on_one_device(x: Any) -> bool:
    """Whether ``x`` is whole, since there is one device: it may be reshaped at no cost."""
    return jax.device_count() == 1 and not typed_by_mesh(x)


def on_one_gpu(x: Any) -> bool:
    """Whether it is, and programs run on a GPU, where to launch a kernel takes microseconds."""
    return jax.default_backend() == "gpu" and on_one_device(x)


def full_like(leaf: jax.Array, value: Any) -> jax.Array:
    """One value in the shape and type of ``leaf``, and sharded so where the type says how."""
    full = lax.full(jnp.shape(leaf), value, leaf.dtype)
    return (
        jax.sharding.reshard(full, jax.typeof(leaf).sharding) if explicitly_sharded(leaf) else full
    )


def filling(value: Callable[[Any], Any]) -> Callable[[jax.Array], jax.Array]:
    """``full_like`` by dtype for many leaves: one array for those of a type, less to compile."""
    made: dict[Any, jax.Array] = {}

    def fill(leaf):
        kind = jax.typeof(leaf)
        if kind not in made:
            made[kind] = full_like(leaf, value(leaf.dtype))
        return made[kind]

    return fill


def placed_like(x: jax.Array, leaf: jax.Array) -> jax.Array:
    """``x``, which does not depend on ``leaf``, sharded as the floating ``leaf`` is."""
    if explicitly_sharded(leaf):
        return jax.sharding.reshard(x, jax.typeof(leaf).sharding)
    # Auto axes have no name for a sharding: it spreads along elementwise operations.
    return jnp.where(leaf == leaf, x, lax.optimization_barrier(x))


def call_in_auto(
    f: Callable[..., jax.Array], leaf: Any, *rest: Any, small: bool = False
) -> jax.Array:
    """``f(leaf, *rest)`` with all mesh axes Auto while it runs; ``small`` results are everywhere.

    A result that is not ``small`` is shaped, and sharded, like ``leaf``. For one that is, ``leaf``
    may be a tree of leaves on one mesh.
    """
    sharded = next(filter(explicitly_sharded, jax.tree.leaves(leaf)), None)
    if sharded is None:
        return f(leaf, *rest)
    sharding = jax.typeof(sharded).sharding
    if small:
        sharding = sharding.update(spec=jax.sharding.PartitionSpec())
    return jax.sharding.auto_axes(f, out_sharding=sharding)(leaf, *rest)
