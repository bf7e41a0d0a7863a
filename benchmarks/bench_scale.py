"""A mask update of a whole transformer, and what it sends when the weights are sharded."""

import re
import time
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from benchmarks import _timing
from jaxprune import _topk
from jaxprune._leaves import Leaves

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIZES = {"pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f16": 2, "u32": 4, "s32": 4, "f32": 4}
KINDS = "all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter"


def scores(layers, width):
    """The seven kernels of every block of a decoder."""
    shapes = {"q": (1, 1), "k": (1, 1), "v": (1, 1), "o": (1, 1), "gate": (1, 3), "up": (1, 3)}
    shapes["down"] = (3, 1)
    key = jax.random.key(0)
    return {
        f"block{i}": {
            name: jax.random.normal(
                jax.random.fold_in(key, 10 * i + j), (a * width, b * width), jnp.float32
            )
            for j, (name, (a, b)) in enumerate(shapes.items())
        }
        for i in range(layers)
    }


def update(scores):
    """Global masks at 90 %, all leaves in one search."""
    return jp.prune(scores, 0.9, prunable=jp.matching("block"))[1]


def wire(text):
    """Bytes of the collectives in a compiled program, largest first, by kind."""
    found = []
    for shapes, kind in re.findall(rf"= (.*?) ({KINDS})(?:-start)?\(", text):
        total = sum(
            SIZES.get(dtype, 8) * int(np.prod([int(d) for d in dims.split(",") if d] or [1]))
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        )
        found.append({"kind": kind, "bytes": total})
    return sorted(found, key=lambda f: -f["bytes"])


def compiled(f, tree):
    """A compiled call, and what it took to compile and takes of memory."""
    start = time.perf_counter()
    call = jax.jit(f).lower(tree).compile()
    seconds = time.perf_counter() - start
    size = 4 * sum(leaf.size for leaf in jax.tree.leaves(tree))
    extra = call.memory_analysis().temp_size_in_bytes / size
    return call, {"compile s": seconds, "extra bytes / scores": extra}


def measure(layers, width, repeats):
    tree = jax.block_until_ready(scores(layers, width))
    n = sum(leaf.size for leaf in jax.tree.leaves(tree))
    absolute = jax.jit(lambda t: jax.tree.map(jnp.abs, t))(tree)
    ours, cost = compiled(update, absolute)
    one_pass = jax.jit(lambda t: jax.tree.map(lambda s: s > 1.6, t))
    keep = n // 10

    def partition():
        flat = np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(absolute)])
        return flat >= np.partition(flat, n - keep)[n - keep]

    calls = {
        "ours": lambda: ours(absolute),
        "one compare": lambda: one_pass(absolute),
        "np.partition": partition,
    }
    seconds = _timing.interleaved(calls, repeats, f"{n / 1e6:.0f}M")
    kept = sum(int(m.sum()) for m in jax.tree.leaves(ours(absolute)))
    return {
        "weights": n,
        "leaves": len(jax.tree.leaves(tree)),
        "kept": kept,
        "s": {name: float(np.median(s)) for name, s in seconds.items()},
        "ours / np.partition": _timing.ratio(seconds["ours"], seconds["np.partition"]),
        "ours / one compare": _timing.ratio(seconds["ours"], seconds["one compare"]),
    } | cost


def sorted_lamp(scores, sparsity):
    """LAMP's counts as its authors' code finds them: sorts of every leaf, and of all shares."""

    def shares(leaf):
        energy = jnp.square(jnp.sort(leaf.ravel(), descending=True))
        return energy / jnp.cumsum(energy)

    ranked = [shares(leaf) for leaf in jax.tree.leaves(scores)]
    every = jnp.concatenate(ranked)
    least = jnp.sort(every)[round(sparsity * every.size)]
    return [jnp.sum(share >= least) for share in ranked]


def allocations(layers, width, repeats):
    """The counts of a transformer's leaves, at 90 %."""
    tree = jax.block_until_ready(jax.tree.map(jnp.abs, scores(layers, width)))
    n = sum(leaf.size for leaf in jax.tree.leaves(tree))
    ways = {
        "allocate_global": jp.allocate_global,
        "allocate_lamp": jp.allocate_lamp,
        "LAMP by sorting": sorted_lamp,
    }
    found = {name: compiled(partial(way, sparsity=0.9), tree) for name, way in ways.items()}
    calls = {name: partial(call, tree) for name, (call, _) in found.items()}
    seconds = _timing.interleaved(calls, repeats, f"counts, {n / 1e6:.0f}M")
    return {
        name: {"weights": n, "s": float(np.median(seconds[name]))} | cost
        for name, (_, cost) in found.items()
    }


def sharded_wire(devices, layers, width):
    """What the compiled update sends on a mesh of ``devices``, by the width of the model."""
    mesh = jax.make_mesh((devices,), ("x",), axis_types=(AxisType.Auto,))
    spread = NamedSharding(mesh, P("x", None))
    tree = jax.eval_shape(lambda: scores(layers, width))
    tree = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=spread), tree)
    sent = wire(jax.jit(update).lower(tree).compile().as_text())
    return {
        "devices": devices,
        "weights": sum(s.size for s in jax.tree.leaves(tree)),
        "leaves": len(jax.tree.leaves(tree)),
        "collectives": sent,
    }


def passes(n):
    """How many counting passes the search takes, by how the scores are distributed."""
    rng = np.random.default_rng(0)
    normal, other = np.abs(rng.standard_normal((2, n), np.float32))
    zeros = rng.random(n) < 0.7
    draws = {
        "half-normal": normal,
        "product of two": normal * other,
        "Laplace": np.abs(rng.laplace(size=n)),
        "log-normal": np.exp(rng.standard_normal(n)),
        "Student's t, 3": np.abs(rng.standard_t(3, n)),
        "half-normal, 70 % zeros": np.where(zeros, 0, normal),
        "products, 70 % zeros": np.where(zeros, 0, normal * other),
        "uniform": rng.random(n),
        "on a grid of 50": rng.integers(0, 50, n),
        "2^-120 to 2^120": np.exp2(rng.uniform(-120, 120, n)),
        "around 1, some ulps": 1 + 1e-5 * rng.standard_normal(n),
        "all equal": np.ones(n),
    }
    step = jax.jit(lambda x, keep: _topk._search(Leaves((x,)), keep).step)
    keeps = [jnp.array([[round(n * d)]], jnp.uint32) for d in (0.9, 0.5, 0.3, 0.1, 0.05, 0.01)]
    scored = {name: jnp.asarray(draw, jnp.float32) for name, draw in draws.items()}
    return {name: [int(step(x, keep)) for keep in keeps] for name, x in scored.items()}


def main(argv=None):
    args = _timing.parser(__doc__).parse_args(argv)
    jax.config.update("jax_num_cpu_devices", 8)
    sizes = ((2, 128), (4, 256)) if args.quick else ((12, 288), (12, 576), (24, 576), (31, 576))
    repeats = 2 if args.quick else 7
    results = [measure(layers, width, repeats) for layers, width in sizes]
    head = ["weights", "leaves", "one compare", "np.partition", "ours", "/ compare", "memory"]
    rows = [
        [
            f"{r['weights'] / 1e6:.1f}M",
            r["leaves"],
            *(f"{r['s'][k]:.3f} s" for k in ("one compare", "np.partition", "ours")),
            f"{r['ours / one compare']:.1f}",
            f"{r['extra bytes / scores']:.2f}",
        ]
        for r in results
    ]
    print(_timing.table([head, *rows]))

    counted = [allocations(*size, 3) for size in sizes[:2]]
    rows = [
        [
            f"{r['weights'] / 1e6:.1f}M",
            name,
            f"{r['s']:.3f} s",
            f"{r['compile s']:.1f} s",
            f"{r['extra bytes / scores']:.2f}",
        ]
        for found in counted
        for name, r in found.items()
    ]
    print("\n" + _timing.table([["weights", "counts", "time", "compile", "memory"], *rows]))

    widths = (64, 128) if args.quick else (64, 128, 256)
    meshes = [devices for devices in (2, 8) if devices <= jax.device_count()]
    sent = [sharded_wire(devices, 2, width) for devices in meshes for width in widths]
    head = ["devices", "weights", "collectives", "largest", "all together"]
    rows = [
        [
            s["devices"],
            f"{s['weights']:,}",
            len(s["collectives"]),
            f"{s['collectives'][0]['kind']}, {s['collectives'][0]['bytes']} bytes",
            f"{sum(c['bytes'] for c in s['collectives'])} bytes",
        ]
        for s in sent
    ]
    print("\n" + _timing.table([head, *rows]))
    taken = passes(1 << (18 if args.quick else 22))
    rows = [[name, f"{np.mean(steps):.1f}", max(steps)] for name, steps in taken.items()]
    print("\n" + _timing.table([["scores", "passes, mean", "most"], *rows]))
    saved = {"update": results, "counts": counted, "wire": sent, "passes": taken}
    _timing.save("scale", saved, args.out)

    figure, axis = plt.subplots(figsize=(7, 5))
    for name, style in (("np.partition", "s-"), ("ours", "o-"), ("one compare", "k--")):
        axis.loglog([r["weights"] for r in results], [r["s"][name] for r in results], style)
        axis.lines[-1].set_label("floor: one pass" if name == "one compare" else name)
    axis.set(xlabel="weights", ylabel="s", title="Global masks of a whole transformer")
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(args.out / "scale.png", dpi=120)


if __name__ == "__main__":
    main()
