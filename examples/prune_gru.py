"""A GRU and an LSTM on spoken vowels, dense and with 90 % of their weights removed."""

import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from aeon.datasets import load_japanese_vowels
from tqdm import tqdm

import jaxprune as jp


class Network(nn.Module):
    """A recurrent layer over the frames, and a speaker from its last state."""

    cell: type[nn.RNNCellBase]
    width: int = 64

    @nn.compact
    def __call__(self, x, lengths):
        states = nn.RNN(self.cell(self.width))(x, seq_lengths=lengths)
        last = jnp.take_along_axis(states, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return nn.Dense(9)(last)


def vowels(split):
    """Frames of 12 coefficients, padded to the longest, with lengths and speakers."""
    series, labels = load_japanese_vowels(split=split)
    lengths = np.array([s.shape[1] for s in series])
    x = np.zeros((len(series), 29, 12), np.float32)
    for row, s in zip(x, series, strict=True):
        row[: s.shape[1]] = s.T
    return tuple(map(jnp.asarray, (x, lengths, np.asarray(labels, int) - 1)))


def train(tx, model, data, test, *, steps, seed):
    x, lengths, y = data

    @jax.jit
    def run(key):
        params = model.init(key, x[:1], lengths[:1])

        def loss(params, batch):
            logits = model.apply(params, x[batch], lengths[batch])
            return optax.softmax_cross_entropy_with_integer_labels(logits, y[batch]).mean()

        def step(carry, key):
            params, state = carry
            batch = jax.random.choice(key, len(x), (32,), replace=False)
            updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(jax.random.fold_in(key, 1), steps)
        (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), keys)
        right = model.apply(params, test[0], test[1]).argmax(-1) == test[2]
        return params, state, jnp.mean(right)

    return run(jax.random.key(seed))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sparsity", type=float, default=0.9, help="fraction of weights removed")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args(argv)

    data, test = vowels("train"), vowels("test")
    adam = optax.adam(optax.cosine_decay_schedule(5e-3, args.steps))
    begin, end = args.steps // 10, 3 * args.steps // 4
    pruning = jp.prune_gradually(
        adam,
        jp.cubic_sparsity(args.sparsity, end - begin, begin=begin),
        when=jp.every(10, begin=begin, end=end),
        allocate=jp.allocate_global,
    )
    for name, cell in (("GRU", nn.GRUCell), ("LSTM", nn.OptimizedLSTMCell)):
        scores = {"dense": [], "pruned": []}
        for seed in tqdm(range(args.seeds), desc=name, unit="seed"):
            for kind, tx in (("dense", adam), ("pruned", pruning)):
                options = {"steps": args.steps, "seed": seed}
                params, state, right = train(tx, Network(cell), data, test, **options)
                scores[kind].append(100 * float(right))
        print(f"\n{name}, the last seed:\n{jp.summarize(params, state)}\n")
        for kind, found in scores.items():
            print(
                f"{name} {kind:6s}: {np.mean(found):.2f} ± {np.std(found):.2f} % of "
                f"{len(test[0])} utterances, {args.seeds} seeds"
            )


if __name__ == "__main__":
    main()
