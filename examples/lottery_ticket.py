"""Iterative magnitude pruning: train, prune, rewind the rest, and again."""

import argparse

import jax
import numpy as np
import optax
from quickstart import BATCH, MLP, TRAIN, accuracy, digits, loss
from tqdm import tqdm

import jaxprune as jp


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6, help="of training and pruning")
    parser.add_argument("--fraction", type=float, default=0.4, help="of what is left, each round")
    parser.add_argument("--epochs", type=int, default=10, help="of each round")
    parser.add_argument("--rewind-to", type=int, default=40, help="the step that weights return to")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    data, test = digits(args.seed)
    params = MLP().init(jax.random.key(args.seed), data[0][:1])
    masks = jax.tree.map(lambda p: p == p, jp.select(params))
    early = params

    def train(params, masks, *, keep_early):
        """Train with fixed masks; also returns the parameters at the step to rewind to."""
        tx = optax.chain(optax.adam(2e-3), jp.keep_params_masked(masks))

        @jax.jit
        def step(params, state, x, y):
            updates, state = tx.update(jax.grad(loss)(params, x, y), state, params)
            return optax.apply_updates(params, updates), state

        state, rng, n = tx.init(params), np.random.default_rng(args.seed), 0
        for _ in range(args.epochs):
            for batch in rng.permutation(TRAIN).reshape(-1, BATCH):
                params, state = step(params, state, data[0][batch], data[1][batch])
                n += 1
                if keep_early and n == args.rewind_to:
                    early = params
        return params, early if keep_early else None

    print("round  sparsity  ticket  random masks of the same counts")
    for n in tqdm(range(args.rounds), unit="round"):
        start = params if n == 0 else jp.rewind(params, early, masks)
        params, first = train(start, masks, keep_early=n == 0)
        early = first if n == 0 else early
        scores = jp.random_saliency(jp.select(params), key=jax.random.key(n))
        counts = jax.tree.map(lambda m: m.sum(), masks)
        random = jp.mask_topk(scores, counts)
        control, _ = train(jp.rewind(params, early, random), random, keep_early=False)
        report = jp.summarize(params, masks)
        tqdm.write(
            f"{n:5d}  {report.sparsity:8.2%}  {float(accuracy(params, *test)):6.2%}"
            f"  {float(accuracy(control, *test)):6.2%}"
        )
        # Sparsity is always of all weights: the next round keeps this share of what is left.
        sparsity = 1 - (1 - args.fraction) ** (n + 1)
        scores = jp.magnitude(jp.select(jp.apply_masks(params, masks)))
        masks = jp.mask_topk(scores, jp.allocate_global(scores, sparsity))
    return report


if __name__ == "__main__":
    main()
