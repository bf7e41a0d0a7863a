"""SmolLM2-135M without a fifth of its MLP channels and 2 of 9 query heads, in one shot."""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from benchmarks import _timing

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

MLP, HEADS, LENGTH = 0.2, 2 / 9, 512


def bench_smollm2(args):
    """Perplexity and latency: dense, removed by two criteria, refitted, and removed at random.

    The groups keep each key-value head with its three query heads, so that 20 of the 90 groups of
    the 30 layers go: 60 of 270 query heads.
    """
    import smollm2

    params, tokenizer = smollm2.load()
    first, last = smollm2.news()
    if args.quick:
        params["layers"] = params["layers"][:2]
    few, many = (1, 2) if args.quick else (6, 16)
    calibration = [w[None] for w in smollm2.windows(tokenizer, first, LENGTH, few)]
    texts = smollm2.windows(tokenizer, last, LENGTH, many)
    groups = jp.channel_groups(smollm2.apply, params, calibration[0])

    loss = functools.partial(surprise, smollm2.apply)
    masks = {
        name: removal(criterion(loss, params, calibration), groups)
        for name, criterion in (("Fisher", jp.fisher), ("first order", jp.snip))
    }
    for seed in range(args.seeds):
        drawn = jp.random_saliency(params, key=jax.random.key(seed))
        masks[f"random {seed}"] = removal(drawn, groups)
    models = {"dense": (smollm2.apply, params)}
    refitted = refit(smollm2.apply, params, masks["Fisher"], calibration)
    for name, mask in masks.items():
        models[name] = jp.shrink(smollm2.apply, params, mask, groups)
    models["Fisher, refitted"] = jp.shrink(smollm2.apply, refitted, masks["Fisher"], groups)

    found = {}
    for name, (call, p) in models.items():
        found[name] = smollm2.perplexity(p, texts, call)
        print(f"{name}: perplexity {found[name]:.2f}", flush=True)
    calls = {
        name: functools.partial(jax.jit(models[name][0]), models[name][1], texts[:1])
        for name in ("dense", "Fisher")
    }
    seconds = _timing.interleaved(calls, 2 if args.quick else 8, "latency")
    rows = [("", "weights", "GFLOPs", "perplexity", "latency s", "faster")]
    results = {}
    for name, (call, p) in models.items():
        time = seconds.get(name.removesuffix(", refitted"))
        results[name] = {
            "weights": sum(leaf.size for leaf in jax.tree.leaves(p)),
            "flops": jp.flops(call, p, texts[:1]).total,
            "perplexity": found[name],
            "latency": time and float(np.median(time)),
            "faster": time and 1 / _timing.ratio(time, seconds["dense"]),
        }
        r = results[name]
        rows.append(
            (
                name,
                f"{r['weights'] / 1e6:.1f}M",
                f"{r['flops'] / 1e9:.1f}",
                f"{r['perplexity']:.2f}",
                f"{r['latency']:.2f}" if time else "",
                f"{r['faster']:.2f}x" if time else "",
            )
        )
    print(_timing.table(rows))
    _timing.save("shrink_smollm2", results, args.out)


def surprise(apply, params, tokens):
    logp = jax.nn.log_softmax(apply(params, tokens)[:, :-1])
    return -jnp.mean(jnp.take_along_axis(logp, tokens[:, 1:, None], -1))


def removal(scores, groups):
    """Masks without a fifth of the MLP channels and two ninths of the heads, by summed scores."""
    masks = [
        jp.mask_channels(
            scores,
            groups.where(lambda g, part=part: not g.frozen and part in g.name),
            sparsity,
            reduce=np.sum,
            normalise=None,
        )
        for part, sparsity in (("mlp", MLP), ("attention", HEADS))
    ]
    return jax.tree.map(
        lambda a, b: a if b is None else b, *masks, is_leaf=lambda mask: mask is None
    )


def refit(apply, params, masks, batches):
    """The kernels that read what is removed, by least squares on the calibration text."""
    grams = jp.input_grams(apply, params, batches, prunable=jp.matching(r"(o|down)/kernel"))
    masks = jax.tree.map(lambda _, gram, mask: None if gram is None else mask, params, grams, masks)
    return jp.reconstruct(params, masks, grams, damping=0.01, steps=30)
