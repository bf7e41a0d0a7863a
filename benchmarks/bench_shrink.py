"""Smaller models: a CNN on Fashion-MNIST, and the time that finding groups takes.

``--part cnn``: conv32-pool-conv64-pool-dense128, batch 128, 3 epochs of Adam 1e-3; then channels
go until 2, 4 and 10 times fewer operations are left, and dense and shrunk models train one more
epoch, Adam 1e-3 with a cosine to 0, from the same (shrunk) optimizer state. Test accuracy of the
last step, no checkpoint is picked. ``--tune`` trains on 50,000 images and reads the other 10,000
of the training set, so that recipes can be chosen without the test set.

``--part time``: channel groups of a 30-layer decoder and a model of ResNet-50's size; tracing.
"""

import functools
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from tqdm import tqdm

import jaxprune as jp
from benchmarks import _timing, fashion

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BATCH, EPOCHS, TARGETS = 128, 3, (2, 4, 10)


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        for name, width in (("conv1", 32), ("conv2", 64)):
            x = nn.relu(nn.Conv(width, (3, 3), name=name)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(128, name="dense")(x.reshape(len(x), -1)))
        return nn.Dense(10, name="head")(x)


def loss(apply, params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), y).mean()


def data(tune, quick):
    """Training and test images and labels."""
    x, y = fashion.load("train")
    train, test = (x[..., None], y), None
    if tune:
        train, test = (x[:50_000, ..., None], y[:50_000]), (x[50_000:, ..., None], y[50_000:])
    else:
        x, y = fashion.load("t10k")
        test = (x[..., None], y)
    return tuple((x[:1280], y[:1280]) for x, y in (train, test)) if quick else (train, test)


def stepper(tx, apply):
    @jax.jit
    def step(params, state, x, y):
        grads = jax.grad(functools.partial(loss, apply))(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def epoch(step, params, state, train, key, label):
    order = np.random.default_rng(key).permutation(len(train[0]))
    for i in tqdm(range(len(order) // BATCH), desc=label, leave=False):
        batch = order[i * BATCH : (i + 1) * BATCH]
        params, state = step(params, state, train[0][batch], train[1][batch])
    return params, state


def accuracy(apply, params, test):
    predict = jax.jit(lambda p, x: jnp.argmax(apply(p, x), -1))
    hits = [predict(params, test[0][i : i + 1000]) for i in range(0, len(test[0]), 1000)]
    return 100 * float(np.mean(np.concatenate(hits) == test[1]))


def removal(params, groups, train, seed, times):
    """Masks that leave a ``times``-th of the operations: group-wise first-order scores per FLOP."""
    rng = np.random.default_rng([seed, 99])
    picks = [rng.choice(len(train[0]), min(256, len(train[0])), replace=False) for _ in range(20)]
    batches = [(train[0][i], train[1][i]) for i in picks]
    scores = jp.snip(functools.partial(loss, CNN().apply), params, batches)
    return jp.mask_channels(
        scores,
        groups,
        flops=1 - 1 / times,
        reduce=np.sum,
        normalise=None,
        per_cost=True,
        floor=0.15,
    )


def bench_cnn(args):
    train, test = data(args.tune, args.quick)
    steps = len(train[0]) // BATCH
    begin = EPOCHS * steps
    schedule = optax.join_schedules(
        [optax.constant_schedule(1e-3), optax.cosine_decay_schedule(1e-3, steps)], [begin]
    )
    tx, model = optax.adam(schedule), CNN()
    found: dict[str, list[float]] = {}
    kept = {}
    for seed in range(args.seeds):
        params = model.init(jax.random.key(seed), train[0][:1])
        state, step = tx.init(params), stepper(tx, model.apply)
        for e in range(EPOCHS):
            params, state = epoch(step, params, state, train, [seed, e], f"seed {seed} dense")
        groups = jp.channel_groups(model.apply, params, train[0][:1])
        dense, _ = epoch(step, params, state, train, [seed, EPOCHS], "dense, one more")
        found.setdefault("dense", []).append(accuracy(model.apply, dense, test))
        if seed == 0:
            kept["dense"] = (model.apply, dense)
        for times in TARGETS:
            masks = removal(params, groups, train, seed, times)
            apply, small = jp.shrink(model.apply, params, masks, groups)
            small_state = jp.shrink_state(tx, state, params, masks, groups)
            label = f"{times}x fewer"
            small, _ = epoch(stepper(tx, apply), small, small_state, train, [seed, EPOCHS], label)
            found.setdefault(label, []).append(accuracy(apply, small, test))
            if seed == 0:
                kept[label] = (apply, small)
                if times == 4:
                    kept["masked"] = (model.apply, jp.apply_masks(params, masks))
        print(
            {name: f"{np.mean(v):.2f} ± {np.std(v):.2f}" for name, v in found.items()}, flush=True
        )
    latency_and_size(args, tx, kept, found, train)


def latency_and_size(args, tx, kept, found, train):
    """FLOPs, weights, bytes, accuracy, latency at batch 64 and of a training step."""
    x, y = train[0][:64], train[1][:64]
    forward, training = {}, {}
    for name, (apply, params) in kept.items():
        call = jax.jit(apply)
        forward[name] = functools.partial(call, params, x)
        step, state = stepper(tx, apply), tx.init(params)
        training[name] = functools.partial(step, params, state, x, y)
    repeats = 5 if args.quick else 60
    latency = _timing.interleaved(forward, repeats, "latency")
    turns = _timing.interleaved(training, max(3, repeats // 4), "training step")
    rows = [("", "MFLOPs", "weights", "MB", "accuracy", "latency ms", "faster", "step", "faster")]
    results = {}
    for name, (apply, params) in kept.items():
        weights = sum(leaf.size for leaf in jax.tree.leaves(params))
        faster = 1 / _timing.ratio(latency[name], latency["dense"])
        trains = 1 / _timing.ratio(turns[name], turns["dense"])
        results[name] = {
            "flops": jp.flops(apply, params, x[:1]).total,
            "weights": weights,
            "accuracy": found.get(name),
            "latency_ms": 1e3 * float(np.median(latency[name])),
            "faster": faster,
            "step_ms": 1e3 * float(np.median(turns[name])),
            "step_faster": trains,
        }
        r, score = results[name], found.get(name)
        rows.append(
            (
                name,
                f"{r['flops'] / 1e6:.2f}",
                f"{weights:,}",
                f"{weights * 4 / 1e6:.2f}",
                "" if score is None else f"{np.mean(score):.2f} ± {np.std(score):.2f}",
                f"{r['latency_ms']:.2f}",
                f"{faster:.2f}x",
                f"{r['step_ms']:.1f}",
                f"{trains:.2f}x",
            )
        )
    print(_timing.table(rows))
    draw(results, args.out)
    _timing.save("shrink_cnn", results, args.out)


def draw(results, out):
    """Accuracy against measured latency."""
    out.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(6, 4))
    for name, r in results.items():
        if r["accuracy"] is None:
            continue
        axes.errorbar(
            r["latency_ms"], np.mean(r["accuracy"]), np.std(r["accuracy"]), fmt="o", capsize=3
        )
        axes.annotate(
            name, (r["latency_ms"], np.mean(r["accuracy"])), (6, -12), textcoords="offset points"
        )
    axes.set(
        xlabel="latency of 64 images, ms", ylabel="test accuracy, %", title="Fashion-MNIST, shrunk"
    )
    figure.tight_layout()
    figure.savefig(out / "shrink_cnn.png", dpi=120)


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


def main(argv=None):
    parser = _timing.parser(__doc__)
    parser.add_argument("--part", choices=("cnn", "time"), default="cnn", help="what to measure")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of the CNN")
    parser.add_argument("--tune", action="store_true", help="do not read the test set")
    args = parser.parse_args(argv)
    {"cnn": bench_cnn, "time": bench_time}[args.part](args)


if __name__ == "__main__":
    main()
