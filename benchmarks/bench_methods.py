"""What each method costs: bytes of state per weight, and time per training step."""

import jax
import numpy as np
import optax

import jaxprune as jp
from benchmarks import _timing
from benchmarks.bench_step import mlp, runner

SPARSITY = 0.9


def methods(when):
    """Each method with Adam, by name; masks are recomputed where ``when`` says."""
    adam, key = optax.adam(1e-3), jax.random.key(0)
    moving = {"drop_fraction": 0.3, "when": when, "key": key}
    return {
        "prune_gradually": jp.prune_gradually(adam, SPARSITY, when=when),
        "prune_gradually, packed": jp.prune_gradually(adam, SPARSITY, when=when, packed=True),
        "prune_gradually, global": jp.prune_gradually(
            adam, SPARSITY, when=when, allocate=jp.allocate_global
        ),
        "prune_gradually, movement": jp.prune_gradually(
            adam, SPARSITY, when=when, saliency=jp.movement
        ),
        "prune_below": jp.prune_below(adam, 0.01, when=when, saliency=jp.magnitude),
        "sparse_evolutionary": jp.sparse_evolutionary(adam, SPARSITY, **moving),
        "rigl": jp.rigl(adam, SPARSITY, **moving),
        "granet": jp.granet(adam, SPARSITY, when=when, key=key),
        "ac_dc": jp.ac_dc(adam, SPARSITY, begin=0, period=10, end=10**9),
        "top_kast": jp.top_kast(adam, SPARSITY, when=when),
        "train_straight_through": jp.train_straight_through(adam, SPARSITY, when=when),
        "sr_ste": jp.sr_ste(adam, SPARSITY, when=when),
    }


def bytes_per_weight(tx, params):
    """State beyond that of the wrapped optimizer, over the governed weights."""

    def size(state):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))

    state = jax.eval_shape(tx.init, params)
    weights = sum(leaf.size for leaf in jax.tree.leaves(jp.select(params)))
    return (size(state) - size(state.inner_state)) / weights


def main(argv=None):
    args = _timing.parser(__doc__).parse_args(argv)
    repeats, steps = (2, 10) if args.quick else (15, 10)
    dense = {"dense": optax.adam(1e-3), "dense again": optax.adam(1e-3)}
    chosen = methods(jp.every(10))
    if args.quick:
        chosen = {name: chosen[name] for name in ("prune_gradually", "rigl", "sr_ste")}
    runs = {name: runner(tx, steps) for name, tx in (dense | chosen).items()}
    seconds = _timing.interleaved(runs, repeats, "steps")
    medians = {name: 1e3 * float(np.median(s)) / steps for name, s in seconds.items()}
    ratios = {name: _timing.ratio(s, seconds["dense"]) for name, s in seconds.items()}
    params = mlp()
    memory = {name: bytes_per_weight(tx, params) for name, tx in chosen.items()}
    rows = [["method, masks every 10 steps", "extra bytes per weight", "ms a step", "/ dense"]]
    rows += [
        [name, f"{memory.get(name, 0.0):.2f}", f"{medians[name]:.2f}", f"{ratios[name]:.2f}"]
        for name in runs
    ]
    print(_timing.table(rows))
    _timing.save("methods", {"bytes": memory, "step ms": medians, "step / dense": ratios}, args.out)


if __name__ == "__main__":
    main()
