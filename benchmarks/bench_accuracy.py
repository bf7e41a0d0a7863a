"""Test accuracy of every method on Fashion-MNIST, against sparsity.

LeNet-300-100, batch 128, 6 epochs, Adam 1e-3 with a cosine to 0, every pixel standardised; the
accuracy of the last step, no checkpoint is picked. A process for every core.
``--tune`` trains on 50,000 images and reads the other 10,000 of the training set, so that recipes
can be chosen without the test set. ``--cnn`` trains a small convolutional network for 3 epochs
instead, with three methods.
"""

import multiprocessing
import os
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, partial

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

BATCH, EPOCHS, CNN_EPOCHS = 128, 6, 3
FLOOR = 0.01  # added to a pixel's variance: those at the border hardly vary
SPARSITIES = (0.9, 0.95, 0.98, 0.99)
WIDTHS = (784, 300, 100, 10)


def init(key):
    keys = jax.random.split(key, len(WIDTHS) - 1)
    glorot = jax.nn.initializers.glorot_uniform()
    return {
        f"dense{i}": {"kernel": glorot(k, (a, b)), "bias": jnp.zeros(b)}
        for i, (k, a, b) in enumerate(zip(keys, WIDTHS[:-1], WIDTHS[1:], strict=True))
    }


def logits(params, x):
    for i in range(len(WIDTHS) - 1):
        x = x @ params[f"dense{i}"]["kernel"] + params[f"dense{i}"]["bias"][None, :]
        x = jax.nn.relu(x) if i < len(WIDTHS) - 2 else x
    return x


def init_cnn(key):
    keys = jax.random.split(key, 4)
    shapes = {
        "conv0": (3, 3, 1, 32),
        "conv1": (3, 3, 32, 64),
        "dense0": (7 * 7 * 64, 128),
        "dense1": (128, 10),
    }
    glorot = jax.nn.initializers.glorot_uniform()
    return {
        name: {"kernel": glorot(k, shape), "bias": jnp.zeros(shape[-1])}
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def conv(x, kernel):
    """As one product: XLA's own convolutions take seconds inside a loop on a CPU."""
    h, w, _, out = kernel.shape
    padded = jnp.pad(x, ((0, 0), (h // 2, h // 2), (w // 2, w // 2), (0, 0)))
    parts = [padded[:, i : i + x.shape[1], j : j + x.shape[2]] for i in range(h) for j in range(w)]
    return jnp.concatenate(parts, -1) @ kernel.reshape(-1, out)


def logits_cnn(params, x):
    def pool(x):
        windows = x.reshape(len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2, x.shape[3])
        return windows.max((2, 4))

    x = x.reshape(-1, 28, 28, 1)
    for name in ("conv0", "conv1"):
        x = conv(x, params[name]["kernel"])
        x = pool(jax.nn.relu(x + params[name]["bias"]))
    x = x.reshape(len(x), -1)
    x = jax.nn.relu(x @ params["dense0"]["kernel"] + params["dense0"]["bias"])
    return x @ params["dense1"]["kernel"] + params["dense1"]["bias"]


BRIEF = (  # where not every method is run
    "straight-through, ERK",
    "gradual magnitude, global",
    "RigL, ERK",
)
MODELS = {"LeNet-300-100": (init, logits), "CNN": (init_cnn, logits_cnn)}


def methods(steps):
    """Recipes by name, the recommended one first: ``(inner, sparsity, key) -> transform``."""
    early, begin, end = steps // 4, steps // 5, 3 * steps // 4
    moving = {"drop_fraction": optax.cosine_decay_schedule(0.3, end), "when": jp.every(50, end=end)}

    def straight(method, allocate, **options):
        return lambda inner, s, key: method(
            inner, jp.cubic_sparsity(s, early), when=jp.every(1), allocate=allocate, **options
        )

    def gradual(allocate, saliency=jp.magnitude, end=end):
        return lambda inner, s, key: jp.prune_gradually(
            inner,
            jp.cubic_sparsity(s, end),
            when=jp.every(10, end=end),
            saliency=saliency,
            allocate=allocate,
        )

    def never(step):
        return step < 0

    return {
        "straight-through, ERK": straight(jp.train_straight_through, jp.allocate_erk),
        "straight-through, global": straight(jp.train_straight_through, jp.allocate_global),
        "SR-STE, ERK": straight(jp.sr_ste, jp.allocate_erk),
        "Top-KAST, ERK": lambda inner, s, key: jp.top_kast(
            inner,
            s,
            when=jp.every(1),
            backward_sparsity=1 - 3 * (1 - s),
            penalty=1e-5,
            allocate=jp.allocate_erk,
        ),
        "gradual magnitude, global": gradual(jp.allocate_global),
        "gradual magnitude, ERK": gradual(jp.allocate_erk, end=steps // 2),
        "gradual magnitude, LAMP": gradual(jp.allocate_lamp),
        "gradual magnitude, uniform": gradual(jp.allocate_uniform),
        "gradual Taylor, ERK": gradual(jp.allocate_erk, jp.accumulate(jp.taylor, 0.99)),
        "movement, ERK": gradual(jp.allocate_erk, jp.movement),
        "GraNet, ERK": lambda inner, s, key: jp.granet(
            inner,
            jp.cubic_sparsity(s, end),
            when=jp.every(10, end=end),
            key=key,
            regeneration=0.1,
            allocate=jp.allocate_erk,
        ),
        "AC/DC, ERK": lambda inner, s, key: jp.ac_dc(
            inner, s, begin=begin, period=steps // 10, end=3 * begin, allocate=jp.allocate_erk
        ),
        "RigL, ERK": lambda inner, s, key: jp.rigl(inner, s, key=key, **moving),
        "SET, ERK": lambda inner, s, key: jp.sparse_evolutionary(inner, s, key=key, **moving),
        "static random, ERK": lambda inner, s, key: jp.sparse_evolutionary(
            inner, s, key=key, drop_fraction=0.0, when=never
        ),
    }


def trainer(make, data, evaluation, steps, model="LeNet-300-100"):
    """``train(seed, order) -> (accuracy, sparsity)``, the whole training in one compiled scan."""
    (x, y), (test_x, test_y) = data, evaluation
    init, logits = MODELS[model]

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()

    def right(params):
        parts = [test_x[i : i + 1000] for i in range(0, len(test_x), 1000)]
        return jnp.mean(jnp.concatenate([logits(params, p).argmax(-1) for p in parts]) == test_y)

    @jax.jit
    def train(seed, order):
        key = jax.random.key(seed)
        tx = make(optax.adam(optax.cosine_decay_schedule(1e-3, steps)), jax.random.fold_in(key, 1))
        params = init(key)

        def step(carry, batch):
            params, state = carry
            grads = jax.grad(loss)(params, x[batch], y[batch])
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), order)
        kernels = [layer["kernel"] for layer in params.values()]
        zeros = sum(jnp.sum(k == 0) for k in kernels) / sum(k.size for k in kernels)
        return right(params), zeros

    return train


def orders(seed, n, steps):
    rng = np.random.default_rng(seed)
    epochs = -(-steps * BATCH // n)
    flat = np.concatenate([rng.permutation(n) for _ in range(epochs)])[: steps * BATCH]
    return jnp.asarray(flat.reshape(steps, BATCH), jnp.int32)


def _take_core(cores):
    os.sched_setaffinity(0, {cores.get()})


@cache
def images_and_labels(tune):
    """What is trained on, and what is evaluated, standardised by the former."""
    images, labels = fashion.load("train")
    if tune:
        order = np.random.default_rng(7).permutation(len(images))
        held, used = order[:10_000], order[10_000:]
        data, evaluation = (images[used], labels[used]), (images[held], labels[held])
    else:
        data, evaluation = (images, labels), fashion.load("t10k")
    middle, width = data[0].mean(0), np.sqrt(data[0].var(0) + FLOOR)
    return [
        (jnp.asarray(((x - middle) / width).reshape(len(x), -1)), jnp.asarray(y))
        for x, y in (data, evaluation)
    ]


def run(name, sparsity, seeds, tune, cnn):
    """Accuracy in percent and fraction of zeros for each seed."""
    data, evaluation = images_and_labels(tune)
    steps = (CNN_EPOCHS if cnn else EPOCHS) * len(data[0]) // BATCH
    make = methods(steps).get(name, lambda inner, sparsity, key: inner)
    model = "CNN" if cnn else "LeNet-300-100"
    train = trainer(partial(_at, make, sparsity), data, evaluation, steps, model)
    found = (train(seed, orders(seed, len(data[0]), steps)) for seed in seeds)
    return [(100 * float(right), float(zeros)) for right, zeros in found]


def main(argv=None):
    options = _timing.parser(__doc__)
    options.add_argument("--tune", action="store_true", help="choose recipes on held-out images")
    options.add_argument("--only", nargs="+", default=[], help="methods whose name contains one")
    options.add_argument("--cnn", action="store_true", help="the small convolutional network")
    args = options.parse_args(argv)

    seeds = (0,) if args.quick else (0, 1, 2)
    sparsities = (0.9, 0.98) if args.quick else SPARSITIES
    sparsities = (0.95, 0.99) if args.cnn else sparsities
    names = list(BRIEF if args.quick or args.cnn else methods(100))
    if args.only:
        names = [name for name in methods(100) if any(part in name for part in args.only)]
    jobs = [("dense", 0.0), *((name, s) for name in names for s in sparsities)]

    results, start = defaultdict(dict), time.perf_counter()
    bar = tqdm(total=len(jobs), unit="runs")
    spawn = multiprocessing.get_context("spawn")
    cores = spawn.Queue()
    for core in os.sched_getaffinity(0):
        cores.put(core)
    with ProcessPoolExecutor(cores.qsize(), spawn, _take_core, (cores,)) as pool:
        tasks = {pool.submit(run, *job, seeds, args.tune, args.cnn): job for job in jobs}
        for task in as_completed(tasks):
            name, sparsity = tasks[task]
            results[name][str(sparsity)] = task.result()
            bar.set_postfix_str(f"{name}, {sparsity:.0%}: {task.result()[0][0]:.2f}")
            bar.update()
    results = {name: results[name] for name in ("dense", *names)}
    bar.close()

    def cell(found):
        return _timing.spread([a for a, _ in found])

    rows = [["method", *(f"{s:.0%}" for s in sparsities)]]
    rows += [
        [name, *(cell(r[str(s)]) for s in sparsities)]
        for name, r in results.items()
        if name != "dense"
    ]
    print(f"dense {cell(results['dense']['0.0'])}; mean ± standard deviation of seeds {seeds}\n")
    print(_timing.table(rows))
    for s in sparsities:
        reached = {z for name, r in results.items() if name != "dense" for _, z in r[str(s)]}
        print(f"asked for {s:.2%}: reached {min(reached):.4%} to {max(reached):.4%}")
    print(f"{time.perf_counter() - start:.0f} s")
    name = "accuracy_cnn" if args.cnn else "accuracy"
    _timing.save(name, {"results": results}, args.out)
    draw(results, sparsities, args.out / f"{name}.png")


def _at(make, sparsity, inner, key):
    return make(inner, sparsity, key)


def draw(results, sparsities, path):
    figure, axis = plt.subplots(figsize=(8, 5.5))
    dense = np.mean([a for a, _ in results["dense"]["0.0"]])
    axis.axhline(dense, color="k", ls="--", lw=1, label=f"dense {dense:.2f}")
    colors = plt.get_cmap("tab20").colors
    for (name, r), color in zip(list(results.items())[1:], colors, strict=False):
        means = [np.mean([a for a, _ in r[str(s)]]) for s in sparsities]
        axis.plot([1 - s for s in sparsities], means, "o-", ms=4, color=color, label=name)
    axis.set(xscale="log", xlabel="sparsity", ylabel="accuracy, %", ylim=(75, 90.5))
    axis.set_xticks([1 - s for s in sparsities], [f"{s:.0%}" for s in sparsities])
    axis.minorticks_off()
    axis.invert_xaxis()
    axis.legend(fontsize=7, frameon=False, ncols=2)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=90, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main()
