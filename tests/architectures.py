"""Small models of many shapes and frameworks: ``case(name) -> Case``, random weights everywhere."""

from functools import cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import other_frameworks
from shrinkable import IMAGE, KEY, SEQUENCE, TOKENS, Case, normal, randomised


def linen(module, *args, train=None, rngs=None, **kwargs):
    """A Linen module; ``train=True`` updates batch statistics and draws dropout."""
    call = {} if train is None else {"train": train}
    variables = jax.eval_shape(lambda: module.init({"params": KEY, "dropout": KEY}, *args, **call))
    variables = randomised(variables)
    if train and "batch_stats" in variables:

        def apply(variables, *args):
            return module.apply(
                variables, *args, **call, mutable=["batch_stats"], rngs={"dropout": KEY}
            )

        return Case(apply, variables, args, True)
    return Case(
        lambda v, *args: module.apply(v, *args, **call, rngs={"dropout": KEY}), variables, args
    )


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dropout(0.5, deterministic=not train)(nn.gelu(nn.Dense(12)(x)))
        return nn.Dense(3)(nn.silu(nn.Dense(10)(x)))


class VGG(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (6, 8):
            x = nn.max_pool(nn.relu(nn.Conv(width, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.relu(nn.Dense(10)(x.reshape(len(x), -1)))
        return nn.Dense(3)(x)


class ResNet(nn.Module):
    norm: Any = nn.BatchNorm

    @nn.compact
    def __call__(self, x, train=False):
        def norm():
            if self.norm is nn.BatchNorm:
                return nn.BatchNorm(use_running_average=not train)
            return nn.GroupNorm(4)

        x = nn.relu(norm()(nn.Conv(8, (3, 3), use_bias=False)(x)))
        for width, stride in ((8, 1), (16, 2)):
            y = nn.relu(norm()(nn.Conv(width, (3, 3), (stride, stride), use_bias=False)(x)))
            y = norm()(nn.Conv(width, (3, 3), use_bias=False)(y))
            if x.shape != y.shape:
                x = norm()(nn.Conv(width, (1, 1), (stride, stride), use_bias=False)(x))
            x = nn.relu(x + y)
        return nn.Dense(3)(x.mean((1, 2)))


class DenseNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(6, (3, 3))(x)
        for _ in range(2):
            y = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
            x = jnp.concatenate([x, nn.Conv(4, (3, 3))(y)], -1)
        x = nn.avg_pool(nn.Conv(7, (1, 1))(nn.relu(x)), (2, 2), (2, 2))
        return nn.Dense(3)(x.mean((1, 2)))


class MobileNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu6(nn.Conv(6, (3, 3))(x))
        y = nn.relu6(nn.Conv(12, (1, 1))(x))
        y = nn.relu6(nn.Conv(12, (3, 3), feature_group_count=12)(y))
        squeeze = nn.relu(nn.Conv(4, (1, 1))(y.mean((1, 2), keepdims=True)))
        y = y * nn.sigmoid(nn.Conv(12, (1, 1))(squeeze))
        x = x + nn.Conv(6, (1, 1))(y)
        x = nn.Conv(12, (3, 3), feature_group_count=3)(nn.relu(x))
        return nn.Dense(3)(x.mean((1, 2)))


class UNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        top = nn.relu(nn.Conv(6, (3, 3))(x))
        low = nn.relu(nn.Conv(8, (3, 3))(nn.max_pool(top, (2, 2), (2, 2))))
        up = nn.ConvTranspose(5, (2, 2), (2, 2))(low)
        x = nn.relu(nn.Conv(6, (3, 3))(jnp.concatenate([top, up], -1)))
        x = x + jax.image.resize(nn.Conv(6, (1, 1))(low), x.shape, "nearest")
        return nn.Conv(2, (1, 1))(x)


class ViT(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(12, (4, 4), (4, 4))(x)
        x = x.reshape(len(x), -1, 12)
        token = self.param("token", nn.initializers.normal(), (1, 1, 12))
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, 12)), x], 1)
        x = x + self.param("position", nn.initializers.normal(), (1, x.shape[1], 12))
        y = nn.LayerNorm()(x)
        y = nn.MultiHeadDotProductAttention(3, dropout_rate=0.2, deterministic=not train)(y, y)
        x = x + y
        y = nn.Dense(12)(nn.gelu(nn.Dense(20)(nn.LayerNorm()(x))))
        x = x + nn.Dropout(0.3, deterministic=not train)(y)
        return nn.Dense(3)(nn.LayerNorm()(x)[:, 0])


class Recurrent(nn.Module):
    cell: Any

    @nn.compact
    def __call__(self, x):
        x = nn.RNN(self.cell(7))(x)
        return nn.Dense(3)(nn.RNN(self.cell(6))(x)[:, -1])


class Stacked(nn.Module):
    @nn.compact
    def __call__(self, x):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x + nn.Dense(6)(jnp.tanh(nn.Dense(9)(x))), None

        stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return nn.Dense(3)(stack()(nn.Dense(6)(x), None)[0])


class Remat(nn.Module):
    @nn.compact
    def __call__(self, x):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x):
                return x + nn.Dense(6)(nn.relu(nn.Dense(9)(nn.RMSNorm()(x))))

        x = nn.Dense(6)(x)
        for _ in range(2):
            x = nn.remat(Block)()(x)
        return nn.Dense(3)(x)


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 8)
        x = embed(tokens)
        x = x + nn.Dense(8)(nn.relu(nn.Dense(10)(nn.RMSNorm()(x))))
        return embed.attend(nn.RMSNorm()(x))


def decoder(
    layers=2,
    width=12,
    heads=6,
    shared=3,
    head=4,
    hidden=16,
    vocabulary=13,
    length=5,
    interleaved=False,
):
    """SmolLM2's shape: grouped queries, rotary positions, RMS norms, a gated MLP, a tied head."""
    shapes = {"embed": (vocabulary, width), "norm": (width,)}
    for i in range(layers):
        shapes[f"layer{i}"] = {
            "q": (width, heads * head),
            "k": (width, shared * head),
            "v": (width, shared * head),
            "o": (heads * head, width),
            "gate": (width, hidden),
            "up": (width, hidden),
            "down": (hidden, width),
            "norm1": (width,),
            "norm2": (width,),
        }
    params = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32),
        shapes,
        is_leaf=lambda s: isinstance(s, tuple),
    )

    def norm(x, scale):
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * scale[None, None]

    def rotate(x):
        angle = jnp.arange(x.shape[1])[:, None] * 10.0 ** -jnp.arange(0, 1, 2 / head)[None]
        cos, sin = (f(angle)[None, :, None] for f in (jnp.cos, jnp.sin))
        if interleaved:
            a, b = x[..., ::2], x[..., 1::2]
            return jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)
        a, b = jnp.split(x, 2, -1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def apply(params, tokens):
        x = params["embed"][tokens]
        batch, time = tokens.shape
        mask = jnp.tril(jnp.ones((time, time), bool))
        for i in range(layers):
            p = params[f"layer{i}"]
            y = norm(x, p["norm1"])
            q, k, v = ((y @ p[name]).reshape(batch, time, -1, head) for name in ("q", "k", "v"))
            q, k = rotate(q), rotate(k)
            q = q.reshape(batch, time, k.shape[2], -1, head)
            scores = jnp.einsum("btgrd,bsgd->bgrts", q, k) / np.sqrt(head).astype(np.float32)
            weights = jax.nn.softmax(jnp.where(mask[None, None, None], scores, -1e9), -1)
            y = jnp.einsum("bgrts,bsgd->btgrd", weights, v).reshape(batch, time, -1)
            x = x + y @ p["o"]
            y = norm(x, p["norm2"])
            x = x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]
        return norm(x, params["norm"]) @ params["embed"].T

    tokens = jnp.asarray(np.random.default_rng(0).integers(0, vocabulary, (2, length)))
    return apply, params, tokens


def decoder_case(interleaved=False):
    apply, shapes, tokens = decoder(interleaved=interleaved)
    return Case(apply, randomised(shapes), (tokens,))


def experts_case():
    """Dense mixture of experts with sigmoid gates: whole experts may go."""
    shapes = {"in": (4, 6), "gate": (6, 5), "up": (5, 6, 8), "down": (5, 8, 6), "out": (6, 3)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

    def apply(p, x):
        x = x @ p["in"]
        gate = jax.nn.sigmoid(x @ p["gate"])
        hidden = jax.nn.relu(jnp.einsum("bd,edf->ebf", x, p["up"]))
        return (x + jnp.einsum("be,ebf,efd->bd", gate, hidden, p["down"])) @ p["out"]

    return Case(apply, randomised(params), (normal(4, 4),))


def grouped_case():
    """Gated halves, padding shortcuts, constants, reversals, branches and loops."""
    shapes = {
        "in": (4, 6),
        "glu": (6, 16),
        "back": (8, 6),
        "wide": (6, 9),
        "loop": (9, 9),
        "out": (9, 3),
    }
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

    def apply(p, x):
        x = x @ p["in"]
        a, b = jnp.split(x @ p["glu"], 2, -1)
        x = x + (a * jax.nn.sigmoid(b)) @ p["back"]
        table = jax.jit(lambda x: x * jnp.asarray(np.arange(6, dtype=np.float32))[None])
        x = table(x)
        y = jax.nn.relu(x @ p["wide"]) + jnp.pad(x, ((0, 0), (0, 3)))
        y = jax.lax.cond(
            x[0, 0] > 0, lambda y: jnp.tanh(y), lambda y: jnp.sin(y)[:, ::-1][:, ::-1], y
        )
        y = jax.lax.fori_loop(0, 2, lambda i, y: y + jnp.tanh(y @ p["loop"]), y)
        return y @ p["out"]

    return Case(apply, randomised(params), (normal(4, 4),))


CASES = {
    "mlp": lambda: linen(MLP(), normal(4, 5), train=False),
    "mlp dropout": lambda: linen(MLP(), normal(4, 5), train=True),
    "vgg": lambda: linen(VGG(), IMAGE),
    "resnet": lambda: linen(ResNet(), IMAGE, train=False),
    "resnet training": lambda: linen(ResNet(), IMAGE, train=True),
    "groupnorm": lambda: linen(ResNet(nn.GroupNorm), IMAGE),
    "densenet": lambda: linen(DenseNet(), IMAGE, train=True),
    "mobilenet": lambda: linen(MobileNet(), IMAGE),
    "unet": lambda: linen(UNet(), IMAGE),
    "vit": lambda: linen(ViT(), IMAGE),
    "vit training": lambda: linen(ViT(), IMAGE, train=True),
    "decoder": decoder_case,
    "decoder interleaved": lambda: decoder_case(True),
    "lstm": lambda: linen(Recurrent(nn.OptimizedLSTMCell), SEQUENCE),
    "gru": lambda: linen(Recurrent(nn.GRUCell), SEQUENCE),
    "stacked": lambda: linen(Stacked(), normal(4, 5)),
    "experts": experts_case,
    "tied": lambda: linen(Tied(), TOKENS),
    "remat": lambda: linen(Remat(), normal(4, 5)),
    "grouped": grouped_case,
} | other_frameworks.CASES


@cache
def case(name):
    return CASES[name]()
