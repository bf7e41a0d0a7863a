"""One-shot pruning of SmolLM2-135M: perplexity, time and peak memory of every method.

    python benchmarks/bench_llm.py --methods sparsegpt,wanda --targets 0.5,2:4

Calibration: 64 x 512 tokens of the first 150 news articles; evaluation: 74 x 512 of the last 150.
The weights are dequantised 4-bit. One process per method, so that peak memory is the method's own.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

METHODS = ("magnitude", "wanda", "sparsegpt", "alps", "alps+dense")  # +dense: dense_targets=True


def method_of(name, jp):
    return {
        "magnitude": jp.by_saliency(jp.magnitude, per_output=False),
        "wanda": jp.by_saliency(jp.wanda),
        "sparsegpt": jp.sparsegpt,
        "alps": jp.alps,
    }[name.removesuffix("+dense")]


def run(name, target, texts):
    import smollm2

    import jaxprune as jp

    params, tokenizer = smollm2.load()
    calibration, _ = texts(smollm2)
    batches = smollm2.windows(tokenizer, calibration, count=64).reshape(16, 4, 512)
    pattern = {"n_m": tuple(map(int, target.split(":")))} if ":" in target else {}
    begin = time.perf_counter()
    new, masks, log = jp.prune_layerwise(
        smollm2.apply,
        params,
        list(batches),
        None if pattern else float(target),
        **pattern,
        method=method_of(name, jp),
        prunable=jp.matching("kernel"),
        dense_targets=name.endswith("+dense"),
        progress=lambda layer: print(
            f"{layer.path:32} {layer.sparsity:.4f} {layer.error:.5f}", file=sys.stderr, flush=True
        ),
    )
    seconds = time.perf_counter() - begin
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    _, held_out = texts(smollm2)
    return {
        "method": name,
        "target": target,
        "perplexity": smollm2.perplexity(new, smollm2.windows(tokenizer, held_out)),
        "density": float(jp.density(masks)),
        "seconds": seconds,
        "peak_gib": memory,
        "errors": {layer.path: layer.error for layer in log},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--targets", default="0.5,0.6,2:4")
    parser.add_argument("--out", help="append results to this file, one JSON object a line")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run(*args.one, texts=lambda smollm2: smollm2.news())))
        return
    print("| target | method | perplexity | seconds | peak GiB |")
    print("|---|---|---|---|---|")
    for target in args.targets.split(","):
        for name in args.methods.split(","):
            command = [sys.executable, __file__, "--one", name, target]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            row = json.loads(out.splitlines()[-1])
            print(
                f"| {target} | {name} | {row['perplexity']:.2f} | {row['seconds']:.0f} | "
                f"{row['peak_gib']:.2f} |",
                flush=True,
            )
            if args.out:
                with open(args.out, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
