"""Prune every weight whose magnitude or gradient is too small, until the masks stop changing."""

import argparse

import jax
import numpy as np
import optax
from quickstart import MLP, TRAIN, accuracy, digits, loss
from tqdm import tqdm

import jaxprune as jp


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--saliency", choices=("magnitude", "gradient"), default="magnitude")
    parser.add_argument("--threshold", type=float, default=0.08, help="prune at or below this")
    parser.add_argument("--patience", type=int, default=3, help="epochs without a change to stop")
    parser.add_argument("--epochs", type=int, default=40, help="at most")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    data, test = digits(args.seed)
    params = MLP().init(jax.random.key(args.seed), data[0][:1])
    saliency = jp.magnitude if args.saliency == "magnitude" else jp.gradient_magnitude
    epoch = TRAIN // 100
    # The first epoch trains all weights, so that those which matter have grown. The learning rate
    # falls to zero: while weights keep moving, some always reach the threshold.
    adam = optax.adam(optax.cosine_decay_schedule(2e-3, 3 * args.epochs * epoch // 4))
    when = jp.every(epoch, begin=epoch)
    tx = jp.prune_below(adam, args.threshold, when=when, saliency=saliency)

    @jax.jit
    def step(params, state, x, y):
        grads = jax.grad(loss)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, rng = tx.init(params), np.random.default_rng(args.seed)
    kept, unchanged = None, 0
    with tqdm(range(args.epochs), unit="epoch") as bar:
        for _ in bar:
            for batch in rng.permutation(TRAIN).reshape(epoch, -1):
                params, state = step(params, state, data[0][batch], data[1][batch])
            report = jp.summarize(params, state)
            unchanged = unchanged + 1 if report.kept == kept else 0
            kept = report.kept
            bar.set_postfix(kept=kept, accuracy=f"{float(accuracy(params, *test)):.1%}")
            if unchanged == args.patience:
                break
    print(f"\n{report}\n")
    print(f"masks unchanged for {unchanged} epochs; threshold {args.threshold} on {args.saliency}")
    print(f"test accuracy: {float(accuracy(params, *test)):.2%}")
    return report


if __name__ == "__main__":
    main()
