"""Small models of many shapes and frameworks: ``build() -> Case``, random weights everywhere."""

from functools import cache
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

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


def of_nnx(make, *args, has_state=False):
    graph, state = nnx.split(make(nnx.Rngs(0)))
    state = randomised(state)

    def apply(state, *args):
        model = nnx.merge(graph, state)
        y = model(*args)
        return (y, nnx.state(model, nnx.BatchStat)) if has_state else y

    return Case(apply, state, args, has_state)


class NnxMLP(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.Linear(4, 12, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.norm = nnx.LayerNorm(12, rngs=rngs)
        self.b = nnx.Linear(12, 3, rngs=rngs)

    def __call__(self, x):
        return self.b(self.norm(self.drop(nnx.elu(self.a(x)))))


class NnxResNet(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(2, 6, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.conv = nnx.Conv(6, 6, (3, 3), rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        return self.head((x + nnx.relu(self.conv(x))).mean((1, 2)))


class NnxAttention(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(9, 12, rngs=rngs)
        self.norm = nnx.RMSNorm(12, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(3, 12, decode=False, rngs=rngs)
        self.rnn = nnx.RNN(nnx.GRUCell(12, 6, rngs=rngs))
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        return self.head(self.rnn(x + self.attention(self.norm(x))))


def haiku(f, *args, state=False):
    model = hk.transform_with_state(f)
    shapes = jax.eval_shape(model.init, KEY, *args)
    params, stats = randomised(shapes)
    if state:
        return Case(
            lambda v, *args: model.apply(v["params"], v["state"], KEY, *args),
            {"params": params, "state": stats},
            args,
            True,
        )
    return Case(lambda p, *args: model.apply(p, {}, KEY, *args)[0], params, args)


def hk_resnet(x):
    x = jax.nn.relu(hk.BatchNorm(True, True, 0.9)(hk.Conv2D(6, 3)(x), True))
    x = x + jax.nn.relu(hk.Conv2D(6, 3)(x))
    return hk.Linear(3)(hk.AvgPool((2, 2, 1), (2, 2, 1), "VALID")(x).mean((1, 2)))


def hk_attention(x):
    x = hk.Linear(8)(x)
    y = hk.LayerNorm(-1, True, True)(x)
    x = x + hk.MultiHeadAttention(2, 4, w_init=hk.initializers.VarianceScaling())(y, y, y)
    return hk.Linear(3)(x + hk.nets.MLP([10, 8], activation=jax.nn.gelu)(x))


def hk_recurrent(x):
    for core in (hk.LSTM(6), hk.GRU(5)):
        x, _ = hk.dynamic_unroll(core, x, core.initial_state(x.shape[1]))
    return hk.Linear(3)(x[-1])


def equinox(make, *args):
    params, static = eqx.partition(make(KEY), eqx.is_inexact_array)

    def apply(params, *args):
        return jax.vmap(eqx.combine(params, static))(*args)

    return Case(apply, randomised(params), args)


class EqxConv(eqx.Module):
    layers: list

    def __init__(self, key):
        a, b, c, d = jax.random.split(key, 4)
        self.layers = [
            eqx.nn.Conv2d(2, 8, 3, padding=1, key=a),
            eqx.nn.GroupNorm(4, 8),
            jax.nn.relu,
            eqx.nn.MaxPool2d(2, 2),
            eqx.nn.Conv2d(8, 8, 3, groups=8, key=b),
            jax.nn.swish,
            eqx.nn.ConvTranspose2d(8, 6, 2, 2, key=c),
            jnp.ravel,
            eqx.nn.Linear(6 * 16, 3, key=d),
        ]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class EqxAttention(eqx.Module):
    norm: eqx.Module
    attention: eqx.Module
    cell: eqx.Module
    mlp: eqx.Module

    def __init__(self, key):
        a, b, c = jax.random.split(key, 3)
        self.norm = eqx.nn.RMSNorm(8)
        self.attention = eqx.nn.MultiheadAttention(2, 8, key=a)
        self.cell = eqx.nn.LSTMCell(8, 6, key=b)
        self.mlp = eqx.nn.MLP(6, 3, 9, 2, key=c)

    def __call__(self, x):
        y = jax.vmap(self.norm)(x)
        x = x + self.attention(y, y, y)
        start = (jnp.zeros(6), jnp.zeros(6))
        (h, _), _ = jax.lax.scan(lambda s, y: (self.cell(y, s), None), start, x)
        return self.mlp(h)


IMAGE = normal(2, 8, 8, 2)
SEQUENCE = normal(2, 5, 4)
TOKENS = jnp.asarray(np.random.default_rng(2).integers(0, 9, (2, 5)))

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
    "nnx mlp": lambda: of_nnx(NnxMLP, normal(4, 4)),
    "nnx resnet": lambda: of_nnx(NnxResNet, IMAGE, has_state=True),
    "nnx attention": lambda: of_nnx(NnxAttention, TOKENS),
    "haiku resnet": lambda: haiku(hk_resnet, IMAGE, state=True),
    "haiku attention": lambda: haiku(hk_attention, normal(2, 5, 4)),
    "haiku recurrent": lambda: haiku(hk_recurrent, normal(5, 2, 4)),
    "equinox conv": lambda: equinox(EqxConv, normal(2, 2, 8, 8)),
    "equinox attention": lambda: equinox(EqxAttention, normal(2, 5, 8)),
}


@cache
def case(name):
    return CASES[name]()
