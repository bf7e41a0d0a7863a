"""The same functions over Flax Linen, Flax NNX, Haiku, Equinox and plain containers."""

from typing import NamedTuple

import chex
import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxprune as jp
from jaxprune import _tree

DTYPE_PROMOTION = "standard"  # the layers themselves promote
KEY = jax.random.key(0)


def selected(params):
    governed = jp.select(params)
    return {path for path, leaf in _tree.leaves_with_paths(governed) if leaf is not None}


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 8)(tokens)
        x = x + self.param("pos_embedding", nn.initializers.normal(), (1, 5, 8))
        x = nn.LayerNorm()(x)
        x = nn.MultiHeadDotProductAttention(num_heads=2)(x)
        x = nn.Conv(4, (3,))(x)
        x = nn.BatchNorm(use_running_average=True)(x)
        return nn.Dense(3)(x)


class LinenLayer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(8)(nn.LayerNorm()(x)), None


def test_linen():
    params = LinenBlock().init(KEY, jnp.zeros((1, 5), int))
    attention = "params/MultiHeadDotProductAttention_0"
    want = {f"{attention}/{name}/kernel" for name in ("query", "key", "value", "out")}
    assert selected(params) == want | {"params/Conv_0/kernel", "params/Dense_0/kernel"}


def test_linen_layers_stacked_by_scan():
    stack = nn.scan(LinenLayer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    params = stack().init(KEY, jnp.zeros((2, 8)), None)
    assert selected(params) == {"params/Dense_0/kernel"}


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.conv = nnx.Conv(8, 4, (3,), rngs=rngs)
        self.bn = nnx.BatchNorm(4, rngs=rngs)
        self.dense = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, tokens):
        x = self.conv(self.attention(self.norm(self.embed(tokens))))
        return self.dense(self.bn(x, use_running_average=True))


def test_nnx():
    state = nnx.state(NnxBlock(nnx.Rngs(0)))
    want = {f"attention/{name}/kernel" for name in ("query", "key", "value", "out")}
    assert selected(state) == want | {"conv/kernel", "dense/kernel"}


def test_nnx_optimizer():
    model = NnxBlock(nnx.Rngs(0))
    tx = jp.prune_gradually(optax.adamw(1e-2), 0.75, when=jp.every(1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        grads = nnx.grad(lambda m: jnp.mean(jnp.square(m(x))))(model)
        optimizer.update(model, grads)

    for _ in range(3):
        step(model, optimizer, jnp.zeros((2, 5), int))
    params = nnx.state(model, nnx.Param)
    masks = jp.get_masks(optimizer.opt_state, params)
    kernel, mask = params["dense"]["kernel"], masks["dense"]["kernel"]
    assert int(mask[...].sum() if hasattr(mask, "get_value") else mask.sum()) == 3
    assert int(jnp.count_nonzero(kernel[...])) == 3
    report = jp.summarize(params, optimizer.opt_state)
    assert report.sparsity == pytest.approx(0.75, abs=1e-3)


def test_haiku():
    def forward(tokens):
        x = hk.Embed(11, 8)(tokens)
        x = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
        x = hk.MultiHeadAttention(2, 4, w_init=hk.initializers.RandomNormal())(x, x, x)
        x = hk.Conv1D(4, 3)(x)
        return hk.Linear(3)(x)

    params = hk.transform(forward).init(KEY, jnp.zeros((1, 5), int))
    want = {f"multi_head_attention/{name}/w" for name in ("query", "key", "value", "linear")}
    assert {path.replace("~/", "") for path in selected(params)} == want | {"conv1_d/w", "linear/w"}


class EqxBlock(eqx.Module):
    embed: eqx.nn.Embedding
    norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    conv: eqx.nn.Conv2d
    linear: eqx.nn.Linear
    activation: object

    def __init__(self):
        self.embed = eqx.nn.Embedding(11, 8, key=KEY)
        self.norm = eqx.nn.LayerNorm(8)
        self.attention = eqx.nn.MultiheadAttention(2, 8, key=KEY)
        self.conv = eqx.nn.Conv2d(3, 8, 3, key=KEY)
        self.linear = eqx.nn.Linear(8, 3, key=KEY)
        self.activation = jax.nn.relu


def test_equinox():
    params = eqx.filter(EqxBlock(), eqx.is_inexact_array)
    want = {f"attention/{n}_proj/weight" for n in ("query", "key", "value", "output")}
    assert selected(params) == want | {"conv/weight", "linear/weight"}


class Pair(NamedTuple):
    kernel: jax.Array
    bias: jax.Array


@chex.dataclass
class Layer:
    kernel: jax.Array
    bias: jax.Array


@pytest.mark.parametrize("wrap", [Pair, Layer, dict])
def test_plain_containers(wrap):
    params = [wrap(kernel=jnp.arange(12.0).reshape(3, 4), bias=jnp.ones(4)), None]
    pruned, masks = jp.prune(params, 0.5)
    assert jax.tree.structure(pruned) == jax.tree.structure(params)
    assert sum(int(m.sum()) for m in jax.tree.leaves(masks)) == 6
    assert jp.summarize(params, masks).leaves[0].path == "0/kernel"


@pytest.mark.parametrize(
    ("path", "shape", "prunable"),
    [
        ("a/kernel", (3, 4), True),
        ("weight", (3, 4), True),
        ("attention/query/bias", (4, 8), False),
        ("conv/bias", (8, 1, 1), False),
        ("layers/norm/scale", (3, 8), False),
        ("bn/mean", (3, 8), False),
        ("bn/var", (3, 8), False),
        ("offset", (3, 8), False),
        ("wte", (3, 8), False),
        ("wpe/w", (3, 8), False),
        ("token_embedder/embedding", (3, 8), False),
        ("pos_embed", (3, 8), False),
        ("position/kernel", (3, 8), False),
        ("conv_transpose/kernel", (3, 8), True),
        ("compose/kernel", (3, 8), True),
        ("kernel", (8,), False),
    ],
)
def test_the_default_rule(path, shape, prunable):
    assert jp.kernels(path, jnp.ones(shape)) is prunable
    assert jp.kernels(path, jax.ShapeDtypeStruct(shape, np.int32)) is False


def test_a_tree_without_leaves_passes_init():
    for tx in (
        jp.prune_gradually(optax.sgd(0.1), 0.5, when=jp.every(1)),
        jp.rigl(optax.sgd(0.1), 0.5, drop_fraction=0.3, when=jp.every(1), key=KEY),
    ):
        tx.init({})
