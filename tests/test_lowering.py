"""Every mask update and every transform lowers for CPU, CUDA and TPU without a host callback."""

import jax
import jax.numpy as jnp
import optax
import pytest
from cases import ALLOCATIONS, METHODS, loss, params
from jax import export

import jaxprune as jp

DTYPE_PROMOTION = "standard"  # optax promotes
PLATFORMS = ("cpu", "cuda", "tpu")


def lowered(f, *args):
    text = export.export(jax.jit(f), platforms=PLATFORMS)(*args).mlir_module()
    assert "callback" not in text
    return text


@pytest.mark.parametrize("method", METHODS)
def test_transforms(method):
    tx, p = METHODS[method](optax.adamw(0.01), 0.7), params()

    def step(p, t):
        state = tx.init(p)
        updates, _ = tx.update(jax.grad(loss)(p, t), state, p)
        return optax.apply_updates(p, updates)

    lowered(step, p, jnp.float32(0))


MASKS = {
    **{
        f"topk_{name}": lambda s, allocate=allocate: jp.mask_topk(s, allocate(s, 0.8))
        for name, allocate in ALLOCATIONS.items()
    },
    "slices": lambda s: jp.mask_topk(s, jp.allocate_uniform(s, 0.8), axis=0),
    "groups": lambda s: jp.mask_groups(s, jp.allocate_uniform(s, 0.8), axes=0),
    "blocks": lambda s: jp.mask_blocks(s, jp.allocate_uniform(s, 0.8), block=4),
    "n_m": lambda s: jp.mask_n_m(s, 2, 4, axis=0),
    "threshold": lambda s: jp.mask_threshold(s, 0.5, axes=0),
}


@pytest.mark.parametrize("maker", MASKS)
def test_masks(maker):
    text = lowered(MASKS[maker], {"kernel": jnp.ones((16, 12))})
    assert "stablehlo.sort" not in text
