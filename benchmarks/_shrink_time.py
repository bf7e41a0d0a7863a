"""The time that finding groups takes, and tracing a small model beside the full one."""

import functools
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from benchmarks import _timing


class ResNet50(nn.Module):
    """The sizes of ResNet-50: 25.6M weights."""

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        x = nn.relu(norm()(nn.Conv(64, (7, 7), (2, 2), use_bias=False)(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
        for stage, blocks in enumerate((3, 4, 6, 3)):
            for block in range(blocks):
                width, stride = 64 * 2**stage, 2 if stage and not block else 1
                y = nn.relu(norm()(nn.Conv(width, (1, 1), use_bias=False)(x)))
                y = nn.relu(norm()(nn.Conv(width, (3, 3), (stride, stride), use_bias=False)(y)))
                y = norm()(nn.Conv(4 * width, (1, 1), use_bias=False)(y))
                if not block:
                    x = norm()(nn.Conv(4 * width, (1, 1), (stride, stride), use_bias=False)(x))
                x = nn.relu(x + y)
        return nn.Dense(1000)(x.mean((1, 2)))


def decoder(layers, width=576, heads=9, shared=3, head=64, hidden=1536, vocabulary=49152):
    """Shapes and apply of SmolLM2-135M."""
    block = {
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
    shapes = {"embed": (vocabulary, width), "norm": (width,), "layers": [block] * layers}
    params = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32),
        shapes,
        is_leaf=lambda s: isinstance(s, tuple),
    )

    def norm(x, scale):
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * scale

    def rotate(x):
        angle = jnp.arange(x.shape[1])[:, None] * 1e5 ** -jnp.arange(0, 1, 2 / head)
        cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
        a, b = x[..., ::2], x[..., 1::2]
        return jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)

    def apply(params, tokens):
        x = params["embed"][tokens]
        batch, length = tokens.shape
        mask = jnp.tril(jnp.ones((length, length), bool))
        for p in params["layers"]:
            y = norm(x, p["norm1"])
            q, k, v = ((y @ p[n]).reshape(batch, length, -1, head) for n in "qkv")
            q, k = rotate(q), rotate(k)
            q = q.reshape(batch, length, k.shape[2], -1, head)
            scores = jnp.einsum("btgrd,bsgd->bgrts", q, k) * head**-0.5
            weights = jax.nn.softmax(jnp.where(mask, scores, -1e9), -1)
            y = jnp.einsum("bgrts,bsgd->btgrd", weights, v).reshape(batch, length, -1)
            x = x + y @ p["o"]
            y = norm(x, p["norm2"])
            x = x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]
        return norm(x, params["norm"]) @ params["embed"].T

    return apply, params


def bench_time(args):
    """Seconds to find groups, and to trace the small model beside the full one."""
    apply, params = decoder(2 if args.quick else 30)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    resnet = ResNet50()
    shapes = jax.eval_shape(resnet.init, jax.random.key(0), image)
    models = {
        "decoder": (apply, params, jax.ShapeDtypeStruct((1, 512), jnp.int32)),
        "ResNet-50": (resnet.apply, shapes, image),
    }
    rows = [
        ("model", "weights", "groups", "finding them, s", "trace, s", "small trace, s", "ratio")
    ]
    results = {}
    for name, (apply, params, x) in models.items():
        start = time.perf_counter()
        groups = jp.channel_groups(apply, params, x)
        finding = time.perf_counter() - start
        zeros = jax.tree.map(lambda s: np.zeros(s.shape, np.float32), params)
        live = groups.where(lambda g: not g.frozen and g.exact)
        masks = jp.mask_channels(jax.tree.map(np.abs, zeros), live, 0.3, normalise=None)
        small_apply, small = jp.shrink(apply, zeros, masks, groups)
        full_trace, small_trace = [], []
        for _ in range(3):
            for call, p, seconds in ((apply, zeros, full_trace), (small_apply, small, small_trace)):
                fresh = jax.jit(lambda p, x, call=call: call(p, x))
                start = time.perf_counter()
                fresh.trace(p, x)
                seconds.append(time.perf_counter() - start)
        ratio = _timing.ratio(small_trace, full_trace)
        weights = sum(leaf.size for leaf in jax.tree.leaves(params))
        row = (len(live), finding, np.median(full_trace), np.median(small_trace), ratio)
        results[name] = dict(
            zip(
                ("groups", "finding", "trace", "small_trace", "ratio"), map(float, row), strict=True
            )
        )
        rows.append((name, f"{weights:,}", row[0], *(f"{v:.2f}" for v in row[1:])))
    print(_timing.table(rows))
    _timing.save("shrink_time", results, args.out)
