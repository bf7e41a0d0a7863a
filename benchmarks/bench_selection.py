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


def draws(power):
    """Scores of several draws, and their number."""
    rng = np.random.default_rng(power)
    return [jnp.asarray(np.abs(rng.standard_normal(2**power, np.float32))) for _ in range(DRAWS)]


def calls(scores):
    """What is timed, each with the next of the draws at every call."""
    keep = round(DENSITY * scores[0].size)
    assert all(int(ours(x, keep).sum()) == keep for x in scores)
    ways = {
        "ours": partial(ours, keep=keep),
        "np.partition": lambda x: partition(np.asarray(x), keep),
        "one compare": compare,
        "argsort": partial(argsort, keep=keep),
    }

    def in_turn(way):
        following = cycle(scores)
        return lambda: way(next(following))

    return {name: in_turn(way) for name, way in ways.items()}


def measure(powers, repeats, most):
    """All sizes in the same turns, so that what slows the machine for a while bends no curve.

    To sort takes seconds: it is timed in a few turns, beside ours, up to 2^most scores.
    """
    timed = {power: calls(draws(power)) for power in powers}
    quick = ("ours", "np.partition", "one compare")
    every = {(power, name): timed[power][name] for power in powers for name in quick}
    seconds = _timing.interleaved(every, repeats, "masks")
    sorts = {(p, n): timed[p][n] for p in powers if p <= most for n in ("ours", "argsort")}
    sorting = _timing.interleaved(sorts, max(3, repeats // 8), "sorts")
    results = []
    for power in powers:
        n = 2**power
        names = [*quick, "argsort"] if power <= most else quick
        times = {name: (sorting if name == "argsort" else seconds)[power, name] for name in names}
        scores = jax.ShapeDtypeStruct((n,), jnp.float32)
        memory = ours.lower(scores, round(DENSITY * n)).compile().memory_analysis()
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
    repeats = 5 if args.quick else 35
    results = measure(powers, repeats, most=24)
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
