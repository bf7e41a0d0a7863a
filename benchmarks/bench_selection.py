"""The mask of one array's largest scores: ours, a sort, NumPy's partition, and single passes."""

from functools import partial

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import jaxprune as jp
from benchmarks import _timing

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DENSITY = 0.1
FLOORS = ("one sum", "one compare")  # reads every score; reads it and writes a mask


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


@jax.jit
def total(scores):
    return scores.sum()


def partition(scores, keep):
    return scores >= np.partition(scores, scores.size - keep)[scores.size - keep]


def measure(powers, repeats, most):
    """All sizes in the same turns, so that what slows the machine for a while bends no curve.

    Every turn draws its scores, since how many passes they take is luck. To sort takes seconds: it
    is timed in a few turns, beside ours, up to 2^most scores.
    """
    rng, scores = np.random.default_rng(0), {}

    def draw():
        drawn = np.abs(rng.standard_normal(2 ** max(powers), np.float32))
        scores.update({power: jnp.asarray(drawn[: 2**power]) for power in powers})

    def timed(names, powers):
        ways = {
            "ours": ours,
            "np.partition": lambda x, keep: partition(np.asarray(x), keep),
            "one compare": lambda x, _: compare(x),
            "one sum": lambda x, _: total(x),
            "argsort": argsort,
        }
        pairs = [(power, name) for power in powers for name in names]
        return {(p, n): lambda p=p, n=n: ways[n](scores[p], kept(p)) for p, n in pairs}

    def kept(power):
        return round(DENSITY * 2**power)

    quick = ("ours", "np.partition", *FLOORS)
    seconds = _timing.interleaved(timed(quick, powers), repeats, "masks", draw)
    assert all(int(ours(scores[p], kept(p)).sum()) == kept(p) for p in powers)
    sorts = timed(("ours", "argsort"), [power for power in powers if power <= most])
    sorting = _timing.interleaved(sorts, max(3, repeats // 8), "sorts", draw)
    results = []
    for power in powers:
        n = 2**power
        names = [*quick, "argsort"] if power <= most else quick
        times = {name: (sorting if name == "argsort" else seconds)[power, name] for name in names}
        memory = ours.lower(scores[power], kept(power)).compile().memory_analysis()
        result = {
            "scores": n,
            "ms": {name: 1e3 * float(np.median(found)) for name, found in times.items()},
            "ours / np.partition": _timing.ratio(times["ours"], times["np.partition"]),
            "ours / one compare": _timing.ratio(times["ours"], times["one compare"]),
            "extra bytes / scores": memory.temp_size_in_bytes / (4 * n),
        }
        if power <= most:
            faster = _timing.ratio(sorting[power, "argsort"], sorting[power, "ours"])
            result["argsort / ours"] = faster
        results.append(result)
    return results


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
    for name, style in zip(FLOORS, ("k:", "k--"), strict=True):
        floor = [(r["scores"], r["ms"][name]) for r in results]
        axis.loglog(*zip(*floor, strict=True), style, lw=1, label=f"floor: {name}")
    axis.set(xlabel="scores (float32)", ylabel="ms", title="Mask of the largest 10 %")
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv=None):
    options = _timing.parser(__doc__)
    args = options.parse_args(argv)
    powers = (16, 18, 20) if args.quick else (18, 20, 22, 23, 24, 25, 26)
    repeats = 5 if args.quick else 35
    results = measure(powers, repeats, most=24)
    fitted = [r for r in results if args.quick or r["scores"] >= 2**22]
    growth = {name: exponent(fitted, name) for name in ("ours", "np.partition", *FLOORS)}
    timed = (*FLOORS, "np.partition", "argsort", "ours")
    head = ["scores", *timed, "/ partition", "memory"]
    rows = [
        [
            f"{r['scores']:,}",
            *(f"{r['ms'][k]:.1f} ms" if k in r["ms"] else "" for k in timed),
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
