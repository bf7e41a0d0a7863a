"""Smaller models: a CNN on Fashion-MNIST, SmolLM2-135M, and the time that finding groups takes.

``--part cnn``: conv32-pool-conv64-pool-dense128, batch 128, 3 epochs of Adam 1e-3; then channels
go until 2, 4 and 10 times fewer operations are left, what reads them is refitted by least squares
on 4,096 training images, and dense and shrunk models train one more epoch, Adam 2e-3 with a cosine
to 0, from the same (shrunk) optimizer state. Test accuracy of the last step, no checkpoint is
picked. A process for every core. ``--tune`` trains on 50,000 images and reads the other 10,000 of
the training set, so that recipes can be chosen without the test set.

``--part smollm2``: a fifth of the MLP channels and 2 of 9 query heads gone in one shot.

``--part time``: channel groups of a 30-layer decoder and a model of ResNet-50's size; tracing.
"""

import functools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from tqdm import tqdm

import jaxprune as jp
from benchmarks import _timing, fashion
from benchmarks._shrink_lm import bench_smollm2
from benchmarks._shrink_time import bench_time

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BATCH, EPOCHS = 128, 3
TARGETS = {2: 4, 4: 8, 6: 8, 10: 8}  # times fewer FLOPs, and what channels are a multiple of
CALIBRATION = (16, 256)  # batches, images


class FirstConv(nn.Module):
    """A 3 x 3 convolution of one feature as one product, the pixels that are summed outermost.

    XLA's own takes twice as long on a CPU where it has fewer than 24 filters. ``pooled``: a window
    of 4 x 4 pixels holds what four neighbours see; the largest of the four is given.
    """

    features: int
    pooled: bool

    @nn.compact
    def __call__(self, x):
        _, h, w, _ = x.shape
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, 1, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        padded, filters = jnp.pad(x[..., 0], ((0, 0), (1, 1), (1, 1))), kernel[:, :, 0]
        if not self.pooled:
            seen = [padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
            return jnp.tensordot(jnp.stack(seen), filters.reshape(9, -1), (0, 0)) + bias
        seen = [padded[:, i : i + h - 1 : 2, j : j + w - 1 : 2] for i in range(4) for j in range(4)]
        places = [
            jnp.pad(filters, ((i, 1 - i), (j, 1 - j), (0, 0))).reshape(16, -1)
            for i in (0, 1)
            for j in (0, 1)
        ]
        four = jnp.tensordot(jnp.stack(seen), jnp.stack(places, 1), (0, 0))
        one, two = (jnp.maximum(four[..., i, :], four[..., i + 1, :]) for i in (0, 2))
        return jnp.maximum(one, two) + bias


class CNN(nn.Module):
    """The function is the same with ``training``, which pools by slices, and without ``product``.

    The derivative of slices is fast on a CPU. ``product`` is for the first convolution.
    """

    training: bool = False
    product: bool = True

    @nn.compact
    def __call__(self, x):
        def pool(x):
            if not self.training:
                return nn.max_pool(x, (2, 2), (2, 2))
            rows = jnp.maximum(x[:, ::2], x[:, 1::2])
            return jnp.maximum(rows[:, :, ::2], rows[:, :, 1::2])

        pooled = self.product and not self.training
        if self.product:
            x = FirstConv(32, pooled, name="conv1")(x)
        else:
            x = nn.Conv(32, (3, 3), name="conv1")(x)
        x = nn.relu(x if pooled else pool(x))
        x = nn.relu(pool(nn.Conv(64, (3, 3), name="conv2")(x)))
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
    return tuple((x[:5120], y[:5120]) for x, y in (train, test)) if quick else (train, test)


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


def calibration(train, seed):
    """Batches of training images and labels."""
    rng = np.random.default_rng([seed, 99])
    picks = rng.choice(len(train[0]), CALIBRATION, replace=False)
    return [(train[0][i], train[1][i]) for i in picks]


def removal(apply, params, groups, batches, times):
    """Masks that leave a ``times``-th of the operations, and weights refitted to them."""
    scores = jp.snip(functools.partial(loss, apply), params, batches)
    masks = jp.mask_channels(
        scores,
        groups,
        flops=1 - 1 / times,
        reduce=np.sum,
        normalise=None,
        per_cost=True,
        floor=0.15,
        multiple_of=TARGETS[times],
    )
    grams = jp.input_grams(apply, params, [x for x, _ in batches])
    kernels = jax.tree.map(lambda _, gram, m: None if gram is None else m, params, grams, masks)
    return masks, jp.reconstruct(params, kernels, grams, damping=0.01)


def train_and_shrink(seed, tune, quick):
    """Parameters and accuracy by name: dense, masked, and shrunk to every target."""
    train, test = data(tune, quick)
    steps = len(train[0]) // BATCH
    schedule = optax.join_schedules(
        [optax.constant_schedule(1e-3), optax.cosine_decay_schedule(2e-3, steps)], [EPOCHS * steps]
    )
    tx, model = optax.adam(schedule), CNN(training=True)
    params = model.init(jax.random.key(seed), train[0][:1])
    state, step = tx.init(params), stepper(tx, model.apply)
    for e in range(EPOCHS):
        params, state = epoch(step, params, state, train, [seed, e], f"seed {seed} dense")
    more = (train, [seed, EPOCHS])
    dense, _ = epoch(step, params, state, *more, "dense, one more")
    found = {"dense": (dense, None, accuracy(model.apply, dense, test))}
    groups = jp.channel_groups(model.apply, params, train[0][:1])
    for times in TARGETS:
        masks, refitted = removal(model.apply, params, groups, calibration(train, seed), times)
        apply, small = jp.shrink(model.apply, refitted, masks, groups)
        small_state = jp.shrink_state(tx, state, params, masks, groups)
        label = f"{times}x fewer"
        small, _ = epoch(stepper(tx, apply), small, small_state, *more, label)
        found[label] = (small, masks, accuracy(apply, small, test))
    found["masked"] = (jp.apply_masks(params, found["4x fewer"][1]), None, None)
    return jax.device_get(found)


def bench_cnn(args):
    spawn = multiprocessing.get_context("spawn")
    cores = spawn.Queue()
    for core in os.sched_getaffinity(0):
        cores.put(core)
    results = {}
    with ProcessPoolExecutor(cores.qsize(), spawn, _take_core, (cores,)) as pool:
        tasks = {
            pool.submit(train_and_shrink, seed, args.tune, args.quick): seed
            for seed in range(args.seeds)
        }
        for task in as_completed(tasks):
            results[tasks[task]] = task.result()
            scores = {name: r[2] for name, r in task.result().items()}
            print(f"seed {tasks[task]}: {scores}", flush=True)
    found = {
        name: [results[seed][name][2] for seed in sorted(results)]
        for name in ("dense", *(f"{times}x fewer" for times in TARGETS))
    }
    latency_and_size(args, models(results[0]), found, data(args.tune, args.quick)[0])


def models(found):
    """Predicting and training functions, and parameters, by name."""
    predict, train = CNN().apply, CNN(training=True).apply
    full = found["dense"][0]
    image = jnp.zeros((1, 28, 28, 1))
    made = {
        "dense": (predict, train, full),
        "dense, nn.Conv": (CNN(product=False).apply, train, full),
        "masked": (predict, train, found["masked"][0]),
    }
    for times in TARGETS:
        small, masks, _ = found[f"{times}x fewer"]
        calls = [
            jp.shrink(apply, full, masks, jp.channel_groups(apply, full, image))[0]
            for apply in (predict, train)
        ]
        made[f"{times}x fewer"] = (*calls, small)
    return made


def _take_core(cores):
    os.sched_setaffinity(0, {cores.get()})


def latency_and_size(args, kept, found, train):
    """FLOPs, weights, bytes, accuracy, latency at batch 64, a training step at batch 128."""
    x, tx = train[0][:64], optax.adam(1e-3)
    forward, training = {}, {}
    for name, (predict, apply, params) in kept.items():
        forward[name] = functools.partial(jax.jit(predict), params, x)
        step, state = stepper(tx, apply), tx.init(params)
        batch = train[0][:BATCH], train[1][:BATCH]
        training[name] = functools.partial(step, params, state, *batch)
    repeats = 5 if args.quick else 100
    latency = _timing.interleaved(forward, repeats, "latency")
    turns = _timing.interleaved(training, max(3, repeats // 5), "training step")
    rows = [("", "MFLOPs", "weights", "MB", "accuracy", "latency ms", "faster", "step", "faster")]
    results = {}
    for name, (apply, _, params) in kept.items():
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
                "" if score is None else _timing.spread(score),
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
    """Accuracy against measured latency; the labels say how many times fewer operations."""
    out.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(6, 4))
    known = {name: r for name, r in results.items() if r["accuracy"] is not None}
    for name, r in known.items():
        fewer = results["dense"]["flops"] / r["flops"]
        label = name if name == "dense" else f"{fewer:.1f}x fewer FLOPs"
        place = r["latency_ms"], np.mean(r["accuracy"])
        error = np.std(r["accuracy"], ddof=1) if len(r["accuracy"]) > 1 else None
        axes.errorbar(*place, error, fmt="o", capsize=3, color="#1f6fb4")
        axes.annotate(label, place, (6, -12), textcoords="offset points")
    axes.plot(
        [r["latency_ms"] for r in known.values()],
        [np.mean(r["accuracy"]) for r in known.values()],
        color="#1f6fb4",
        alpha=0.4,
    )
    axes.set(
        xlabel="latency of 64 images, ms",
        ylabel="test accuracy, %",
        title="A CNN on Fashion-MNIST, shrunk",
        xlim=(0, 1.2 * max(r["latency_ms"] for r in known.values())),
    )
    figure.tight_layout()
    figure.savefig(out / "shrink_cnn.png", dpi=120)


def main(argv=None):
    parser = _timing.parser(__doc__)
    parts = {"cnn": bench_cnn, "smollm2": bench_smollm2, "time": bench_time}
    parser.add_argument("--part", choices=parts, default="cnn", help="what to measure")
    parser.add_argument("--seeds", type=int, default=3, help="trainings, or random removals")
    parser.add_argument("--tune", action="store_true", help="do not read the test set")
    args = parser.parse_args(argv)
    parts[args.part](args)


if __name__ == "__main__":
    main()
