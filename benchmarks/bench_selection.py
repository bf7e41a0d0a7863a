"""The mask of one array's largest scores: ours, a sort, NumPy's partition, and one pass."""

from functools import partial
from itertools import cycle

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import jaxprune as jp
from benchmarks import _timing

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DENSITY = 0.1
DRAWS = 7  # the number of passes depends on the scores


@partial(jax.jit, static_argnames="keep")
def ours(scores, keep):
    return jp.mask_topk(scores, keep)


@partial(jax.jit, static_argnames="keep")
def argsort(scores, keep):
    """Threshold at the k-th of all indices sorted by score, as jaxpruner does."""
    return scores >= scores[jnp.argsort(scores)[scores.size - keep]]


@jax.jit
def compare(scores):
    return scores > 1.0


def partition(scores, keep):
    return scores >= np.partition(scores, scores.size - keep)[scores.size - keep]


def measure(power, repeats, *, sort):
    n = 2**power
    keep = round(DENSITY * n)
    rng = np.random.default_rng(power)
    values = [np.abs(rng.standard_normal(n, np.float32)) for _ in range(DRAWS)]
    scores = [jnp.asarray(x) for x in values]
    assert all(int(ours(x, keep).sum()) == keep for x in scores)

    def in_turn(call, draws):
        following = cycle(draws)
        return lambda: call(next(following))

    calls = {
        "ours": in_turn(partial(ours, keep=keep), scores),
        "np.partition": in_turn(partial(partition, keep=keep), values),
        "one compare": in_turn(compare, scores),
    }
    seconds = _timing.interleaved(calls, repeats, f"2^{power}")
    if sort:  # Seconds each: a few turns of its own, beside ours.
        few = {"ours": calls["ours"], "argsort": in_turn(partial(argsort, keep=keep), scores)}
        again = _timing.interleaved(few, max(3, repeats // 5), f"2^{power}, sort")
        seconds["argsort"] = again["argsort"]
        sorting = _timing.ratio(again["argsort"], again["ours"])
    memory = ours.lower(scores[0], keep).compile().memory_analysis()
    result = {
        "scores": n,
        "ms": {name: 1e3 * float(np.median(times)) for name, times in seconds.items()},
        "ours / np.partition": _timing.ratio(seconds["ours"], seconds["np.partition"]),
        "ours / one compare": _timing.ratio(seconds["ours"], seconds["one compare"]),
        "extra bytes / scores": memory.temp_size_in_bytes / (4 * n),
    }
    return result | ({"argsort / ours": sorting} if sort else {})


def exponent(results, name):
    """Of the power of n that fits the times best."""
    points = [(np.log(r["scores"]), np.log(r["ms"][name])) for r in results]
    return float(np.polyfit(*zip(*points, strict=True), 1)[0])


def draw(results, path):
    figure, axis = plt.subplots(figsize=(7, 5))
    styles = {"argsort": "#b0413e", "np.partition": "#888888", "ours": "#1f6fb4"}
    for name, color in styles.items():
        points = [(r["scores"], r["ms"][name]) for r in results if name in r["ms"]]
        axis.loglog(*zip(*points, strict=True), "o-", color=color, label=name)
    floor = [(r["scores"], r["ms"]["one compare"]) for r in results]
    axis.loglog(*zip(*floor, strict=True), "k--", lw=1, label="floor: one pass over memory")
    axis.set(xlabel="scores (float32)", ylabel="ms", title="Mask of the largest 10 %")
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv=None):
    options = _timing.parser(__doc__)
    args = options.parse_args(argv)
    powers = (16, 18, 20) if args.quick else (18, 20, 22, 23, 24, 25, 26)
    repeats = 5 if args.quick else 21
    results = [measure(p, repeats, sort=p <= 24) for p in powers]
    fitted = [r for r in results if args.quick or r["scores"] >= 2**22]
    growth = {name: exponent(fitted, name) for name in ("ours", "np.partition", "one compare")}
    head = ["scores", "one compare", "np.partition", "argsort", "ours", "/ partition", "memory"]
    rows = [
        [
            f"{r['scores']:,}",
            *(
                f"{r['ms'][k]:.1f} ms" if k in r["ms"] else ""
                for k in ("one compare", "np.partition", "argsort", "ours")
            ),
            f"{r['ours / np.partition']:.2f}",
            f"{r['extra bytes / scores']:.2f}",
        ]
        for r in results
    ]
    print(_timing.table([head, *rows]))
    for r in results:
        if "argsort / ours" in r:
            print(f"{r['scores']:,}: {r['argsort / ours']:.0f} times faster than argsort")
    print("time grows as " + ", ".join(f"n^{value:.2f} ({name})" for name, value in growth.items()))
    _timing.save("selection", {"results": results, "growth": growth}, args.out)
    draw(results, args.out / "selection.png")


if __name__ == "__main__":
    _timing.with_large_pages()
    main()
