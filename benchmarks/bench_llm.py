"""One-shot pruning of pretrained models: quality, time and peak memory of every method.

    python benchmarks/bench_llm.py --methods wanda,sparsegpt --targets 0.5,2:4
    python benchmarks/bench_llm.py --text fiction --windows 24
    python benchmarks/bench_llm.py --model minilm

``smollm2`` is SmolLM2-135M, dequantised from 4 bits: perplexity, calibrated on 64 x 512 tokens of
half of a text's documents, evaluated on those of the other half. ``minilm`` is the sentence encoder
MiniLM-L6: mean cosine of pruned to dense embeddings, over sentences of the same halves. One process
per method, so that peak memory is the method's own. ``--order 1`` shuffles the calibration data:
what changes is rounding, and the quality moves with that.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

# LAPACK's threads and XLA's are in each other's way on few cores: eigh takes three times as long.
# And glibc keeps arrays of up to 32 MB that are freed, unless told that large ones start at 1 MB.
ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    **os.environ,
}
METHODS = ("dense", "magnitude", "wanda", "sparsegpt", "sparsegpt+dense", "alps", "alps+dense")


class Case(NamedTuple):
    """A model with its calibration batches and how good a pruned one is."""

    apply: Any
    params: Any
    batches: list[Any]
    weights: str  # pattern of the paths of what is pruned
    quality: Any
    unit: str
    spare: bool  # the dense weights are not needed once others are there


def shuffled(items, order):
    """The items as they come for 0, else in the order of that seed."""
    return items[np.random.default_rng(order).permutation(len(items))] if order else items


def smollm2(calibration, held_out, windows, order):
    import smollm2 as model

    params, tokenizer = model.load()
    batches = shuffled(model.windows(tokenizer, calibration, count=64), order)
    evaluation = model.windows(tokenizer, held_out, count=windows)
    quality = partial(model.perplexity, windows=evaluation)
    batches = list(batches[: len(batches) // 4 * 4].reshape(-1, 4, 512))
    return Case(model.apply, params, batches, "kernel", quality, "perplexity", spare=True)


def minilm(calibration, held_out, windows, order):
    import minilm as model

    params, tokenizer = model.load()
    batches = model.batches(tokenizer, model.sentences(calibration)[:1024])
    batches = [batches[i] for i in shuffled(np.arange(len(batches)), order)]
    evaluation = model.batches(tokenizer, model.sentences(held_out)[:1024])[:windows]
    quality = partial(model.cosine, dense=params, batches=evaluation)
    return Case(model.apply, params, batches, model.KERNELS, quality, "cosine", spare=False)


MODELS = {"smollm2": smollm2, "minilm": minilm}


def prune(case, name, target):
    """The case's parameters, pruned, with their masks and the log of the layers."""
    import jax

    import jaxprune as jp

    pattern = {"n_m": tuple(map(int, target.split(":")))} if ":" in target else {}
    governed = jp.select(case.params, jp.matching(case.weights))
    if name == "dense":
        return case.params, jax.tree.map(lambda w: w == w, governed), []
    if name == "magnitude":  # looks at no data
        scores = jp.magnitude(governed)
        if pattern:
            axes = jp.fan_in_axes(case.apply, case.params, *as_args(case.batches[0]))
            masks = jp.mask_n_m(scores, *pattern["n_m"], axis=axes)
        else:
            masks = jp.mask_topk(scores, jp.allocate_uniform(scores, float(target)))
        return jp.apply_masks(case.params, masks), masks, []
    methods = {"wanda": jp.by_saliency(jp.wanda), "sparsegpt": jp.sparsegpt, "alps": jp.alps}
    return jp.prune_layerwise(
        case.apply,
        case.params,
        case.batches,
        None if pattern else float(target),
        **pattern,
        method=methods[name.removesuffix("+dense")],
        prunable=jp.matching(case.weights),
        dense_targets=name.endswith("+dense"),
        donate=case.spare and not name.endswith("+dense"),
        progress=lambda layer: print(
            f"{layer.path:32} {layer.sparsity:.4f} {layer.error:.5f}", file=sys.stderr, flush=True
        ),
    )


def as_args(batch):
    return batch if isinstance(batch, tuple) else (batch,)


def run(name, target, model, text, windows, order):
    import texts

    import jaxprune as jp

    case = MODELS[model](*texts.TEXTS[text](), windows, order)
    begin = time.perf_counter()
    new, masks, log = prune(case, name, target)
    seconds = time.perf_counter() - begin
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "model": model,
        "text": text,
        "order": order,
        "method": name,
        "target": target,
        case.unit: case.quality(new),
        "density": float(jp.density(masks)),
        "seconds": seconds,
        "peak_gib": memory,
        "errors": {layer.path: layer.error for layer in log},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--text", choices=("news", "fiction", "encyclopedia"), default="news")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--targets", default="0.5,0.6,2:4")
    parser.add_argument(
        "--windows", type=int, help="windows or batches to evaluate on; default all"
    )
    parser.add_argument("--order", type=int, default=0, help="seed of the calibration data's order")
    parser.add_argument("--out", help="append results to this file, one JSON object a line")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run(*args.one, args.model, args.text, args.windows, args.order)))
        return
    print("| text | target | method | quality | seconds | peak GiB |")
    print("|---|---|---|---|---|---|")
    shared = ["--model", args.model, "--text", args.text, "--order", str(args.order)]
    shared += ["--windows", str(args.windows)] if args.windows else []
    for target in args.targets.split(","):
        for name in args.methods.split(","):
            command = [sys.executable, __file__, *shared, "--one", name, target]
            out = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
            ).stdout
            row = json.loads(out.splitlines()[-1])
            unit = "perplexity" if "perplexity" in row else "cosine"
            print(
                f"| {args.text} | {target} | {name} | {unit} {row[unit]:.4g} | "
                f"{row['seconds']:.0f} | {row['peak_gib']:.2f} |",
                flush=True,
            )
            if args.out:
                with open(args.out, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
