"""Small models in NNX, Haiku and Equinox: ``CASES[name]() -> Case``, random weights everywhere."""

from functools import partial

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx
from shrinkable import IMAGE, KEY, TOKENS, Case, normal, randomised


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


class NnxMobileNet(nnx.Module):
    def __init__(self, rngs):
        self.wide = nnx.Conv(2, 8, (1, 1), rngs=rngs)
        self.depthwise = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
        self.norm = nnx.GroupNorm(8, num_groups=4, rngs=rngs)
        self.squeeze = nnx.Linear(8, 3, rngs=rngs)
        self.excite = nnx.Linear(3, 8, rngs=rngs)
        self.up = nnx.ConvTranspose(8, 5, (2, 2), (2, 2), rngs=rngs)
        self.head = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu6(self.norm(self.depthwise(self.wide(x))))
        gate = nnx.sigmoid(self.excite(nnx.relu(self.squeeze(x.mean((1, 2))))))
        return self.head(nnx.relu(self.up(x * gate[:, None, None])))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(6, rngs=rngs)
        self.up = nnx.Linear(6, 9, rngs=rngs)
        self.down = nnx.Linear(9, 6, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.tanh(self.up(self.norm(x))))


class NnxStacked(nnx.Module):
    """Layers made by vmap and run by scan, each rematerialised; a tied embedding."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(9, 6, rngs=rngs)
        self.blocks = nnx.vmap(lambda key: NnxBlock(nnx.Rngs(key)))(jax.random.split(KEY, 3))

    def __call__(self, tokens):
        block = nnx.remat(lambda x, block: block(x))
        x = nnx.scan(block, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
            self.embed(tokens), self.blocks
        )
        return self.embed.attend(x)


class NnxViT(nnx.Module):
    def __init__(self, rngs):
        self.patches = nnx.Conv(2, 12, (4, 4), (4, 4), rngs=rngs)
        self.token = nnx.Param(jnp.zeros((1, 1, 12)))
        self.position = nnx.Param(jnp.zeros((1, 5, 12)))
        self.norm = nnx.LayerNorm(12, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(3, 12, decode=False, rngs=rngs)
        self.lstm = nnx.RNN(nnx.LSTMCell(12, 7, rngs=rngs))
        self.head = nnx.Linear(7, 3, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x).reshape(len(x), -1, 12)
        token = jnp.broadcast_to(self.token[...], (len(x), 1, 12))
        x = jnp.concatenate([token, x], 1) + self.position[...]
        return self.head(self.lstm(x + self.attention(self.norm(x)))[:, 0])


class NnxEvaluated(NnxResNet):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.norm.use_running_average = True


def haiku(f, *args, state=False, evaluate=None):
    """``f`` with its updates of state; or ``evaluate`` with the variables of ``f``."""
    model = hk.transform_with_state(f)
    shapes = jax.eval_shape(model.init, KEY, *args)
    params, stats = randomised(shapes)
    if evaluate is not None:
        model = hk.transform_with_state(evaluate)
        return Case(lambda v, *args: model.apply(*v, KEY, *args)[0], (params, stats), args)
    if state:
        return Case(
            lambda v, *args: model.apply(v["params"], v["state"], KEY, *args),
            {"params": params, "state": stats},
            args,
            True,
        )
    return Case(lambda p, *args: model.apply(p, {}, KEY, *args)[0], params, args)


def hk_resnet(x, train=True):
    x = jax.nn.relu(hk.BatchNorm(True, True, 0.9)(hk.Conv2D(6, 3)(x), train))
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


def hk_mobile(x):
    x = jax.nn.relu(hk.Conv2D(8, 1)(x))
    x = jax.nn.relu(hk.GroupNorm(4)(hk.DepthwiseConv2D(1, 3)(x)))
    x = x * jax.nn.sigmoid(hk.Linear(8)(jax.nn.relu(hk.Linear(3)(x.mean((1, 2))))))[:, None, None]
    x = hk.dropout(hk.next_rng_key(), 0.3, hk.Conv2DTranspose(5, 2, 2)(x))
    return hk.Linear(3)(jax.nn.relu(x))


def hk_stacked(tokens):
    embed = hk.Embed(9, 6)

    def block(x):
        y = hk.RMSNorm(-1)(x)
        return x + hk.Linear(6)(jnp.tanh(hk.Linear(9)(y)))

    x = hk.experimental.layer_stack(3)(hk.remat(block))(embed(tokens))
    return x @ embed.embeddings.T


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


class EqxStacked(eqx.Module):
    embed: eqx.nn.Embedding
    blocks: eqx.nn.MLP
    drop: eqx.nn.Dropout

    def __init__(self, key):
        a, b = jax.random.split(key)
        self.embed = eqx.nn.Embedding(9, 6, key=a)
        make = lambda key: eqx.nn.MLP(6, 6, 9, 1, activation=jnp.tanh, key=key)  # noqa: E731
        self.blocks = eqx.filter_vmap(make)(jax.random.split(b, 3))
        self.drop = eqx.nn.Dropout(0.3)

    def __call__(self, tokens):
        arrays, static = eqx.partition(self.blocks, eqx.is_array)

        @eqx.filter_checkpoint
        def block(x, arrays):
            y = jax.vmap(eqx.combine(arrays, static))(x)
            return x + self.drop(y, key=KEY), None

        x, _ = jax.lax.scan(block, jax.vmap(self.embed)(tokens), arrays)
        return x @ self.embed.weight.T


class EqxResNet(eqx.Module):
    stem: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    conv: eqx.nn.Conv2d
    head: eqx.nn.Linear

    def __init__(self, key):
        a, b, c = jax.random.split(key, 3)
        self.stem = eqx.nn.Conv2d(2, 6, 3, padding=1, use_bias=False, key=a)
        self.norm = eqx.nn.BatchNorm(6, "batch", mode="batch")
        self.conv = eqx.nn.Conv2d(6, 6, 3, padding=1, key=b)
        self.head = eqx.nn.Linear(6, 3, key=c)

    def __call__(self, x, state):
        x, state = self.norm(self.stem(x), state)
        x = jax.nn.relu(x)
        x = x + jax.nn.relu(self.conv(x))
        return self.head(x.mean((1, 2))), state


def equinox_state(make, *args):
    model, state = eqx.nn.make_with_state(make)(KEY)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    variables = randomised({"model": params, "state": state})

    def apply(variables, *args):
        model = eqx.combine(variables["model"], static)
        y, state = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(
            *args, variables["state"]
        )
        return y, {"state": state}

    return Case(apply, variables, args, True)


CASES = {
    "nnx mlp": lambda: of_nnx(NnxMLP, normal(4, 4)),
    "nnx resnet": lambda: of_nnx(NnxResNet, IMAGE, has_state=True),
    "nnx attention": lambda: of_nnx(NnxAttention, TOKENS),
    "haiku resnet": lambda: haiku(hk_resnet, IMAGE, state=True),
    "haiku attention": lambda: haiku(hk_attention, normal(2, 5, 4)),
    "haiku recurrent": lambda: haiku(hk_recurrent, normal(5, 2, 4)),
    "equinox conv": lambda: equinox(EqxConv, normal(2, 2, 8, 8)),
    "equinox attention": lambda: equinox(EqxAttention, normal(2, 5, 8)),
    "nnx resnet evaluated": lambda: of_nnx(NnxEvaluated, IMAGE),
    "nnx mobilenet": lambda: of_nnx(NnxMobileNet, IMAGE),
    "nnx stacked": lambda: of_nnx(NnxStacked, TOKENS),
    "nnx vit": lambda: of_nnx(NnxViT, IMAGE),
    "haiku mobilenet": lambda: haiku(hk_mobile, IMAGE),
    "haiku stacked": lambda: haiku(hk_stacked, TOKENS),
    "haiku resnet evaluated": lambda: haiku(
        hk_resnet, IMAGE, evaluate=partial(hk_resnet, train=False)
    ),
    "equinox stacked": lambda: equinox(EqxStacked, TOKENS),
    "equinox resnet": lambda: equinox_state(EqxResNet, normal(2, 2, 8, 8)),
}
