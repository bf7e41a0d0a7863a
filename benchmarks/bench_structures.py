"""Masks with a structure: N:M, groups and blocks, beside double argsorts and one pass."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from benchmarks import _timing

SPARSITY = 0.5


@jax.jit
def one_pass(scores):
    return scores > 1.0


def ranks(scores):
    """Each score's place within its row, by sorting twice."""
    return jnp.argsort(jnp.argsort(-scores, axis=-1), axis=-1)


@partial(jax.jit, static_argnames=("n", "m", "axis"))
def sorted_n_m(scores, *, n, m, axis):
    moved = jnp.moveaxis(scores, axis, -1)
    kept = ranks(moved.reshape(-1, m)) < n
    return jnp.moveaxis(kept.reshape(moved.shape), -1, axis)


@jax.jit
def sorted_columns(scores):
    means = jnp.mean(scores, 0)
    kept = ranks(means) < round((1 - SPARSITY) * means.size)
    return jnp.broadcast_to(kept[None], scores.shape)


@partial(jax.jit, static_argnames="block")
def sorted_blocks(scores, *, block):
    rows, columns = scores.shape[0] // block, scores.shape[1] // block
    tiles = scores.reshape(rows, block, columns, block)
    means = jnp.mean(tiles, (1, 3)).reshape(-1)
    kept = ranks(means) < round((1 - SPARSITY) * means.size)
    return jnp.broadcast_to(kept.reshape(rows, 1, columns, 1), tiles.shape).reshape(scores.shape)


def cases(size):
    """Name -> (ours, by sorting, at most how many passes)."""
    keep = round((1 - SPARSITY) * size * size)
    patterns = {
        f"{n}:{m} along axis {axis}": (
            lambda s, n=n, m=m, axis=axis: jp.mask_n_m(s, n, m, axis=axis),
            lambda s, n=n, m=m, axis=axis: sorted_n_m(s, n=n, m=m, axis=axis),
            4,
        )
        for n, m in ((2, 4), (1, 4), (4, 8))
        for axis in (0, 1)
    }
    return patterns | {
        "columns": (lambda s: jp.mask_groups(s, keep, axes=0), sorted_columns, 3),
        "rows": (
            lambda s: jp.mask_groups(s, keep, axes=1),
            lambda s: sorted_columns(s.T).T,
            3,
        ),
        "blocks of 16 x 16": (
            lambda s: jp.mask_blocks(s, keep, block=16),
            lambda s: sorted_blocks(s, block=16),
            3,
        ),
        "blocks of 64 x 64": (
            lambda s: jp.mask_blocks(s, keep, block=64),
            lambda s: sorted_blocks(s, block=64),
            3,
        ),
        "2:4 transposable": (lambda s: jp.mask_n_m_transposable(s, 2, 4), None, None),
    }


def measure(scores, ours, sorting, repeats, label):
    compiled = jax.jit(ours)
    calls = {"one pass": lambda: one_pass(scores), "ours": lambda: compiled(scores)}
    seconds = _timing.interleaved(calls, repeats, label)
    result = {
        "ms": {name: 1e3 * float(np.median(times)) for name, times in seconds.items()},
        "ours / one pass": _timing.ratio(seconds["ours"], seconds["one pass"]),
    }
    if sorting is None:
        return result
    # Seconds each: a few turns of their own, beside ours.
    theirs = jax.jit(sorting)
    assert int(compiled(scores).sum()) == int(theirs(scores).sum())
    few = {"ours": calls["ours"], "argsort twice": lambda: theirs(scores)}
    again = _timing.interleaved(few, 3, f"{label}, sorted")
    result["ms"]["argsort twice"] = 1e3 * float(np.median(again["argsort twice"]))
    result["argsort twice / ours"] = _timing.ratio(again["argsort twice"], again["ours"])
    return result


def main(argv=None):
    args = _timing.parser(__doc__).parse_args(argv)
    size, repeats = (512, 5) if args.quick else (4096, 15)
    values = np.abs(np.random.default_rng(0).normal(size=(size, size))).astype(np.float32)
    scores = jnp.asarray(values)
    results = []
    for name, (ours, sorting, bar) in cases(size).items():
        found = measure(scores, ours, sorting, repeats, name)
        results.append({"structure": name, "bar": bar, **found})
    head = ["structure", "one pass", "ours", "argsort twice", "/ one pass", "bar", "faster"]
    rows = [
        [
            r["structure"],
            *(
                f"{r['ms'][k]:.1f} ms" if k in r["ms"] else ""
                for k in ("one pass", "ours", "argsort twice")
            ),
            f"{r['ours / one pass']:.2f}",
            r["bar"] or "",
            f"{r['argsort twice / ours']:.0f} x" if "argsort twice / ours" in r else "",
        ]
        for r in results
    ]
    print(f"{size * size:,} float32 scores; one pass compares and writes a mask")
    print(_timing.table([head, *rows]))
    _timing.save("structures", {"scores": size * size, "results": results}, args.out)


if __name__ == "__main__":
    main()
