"""A training step with pruning beside the same step without."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune as jp
from benchmarks import _timing

WIDTHS = (784, 1024, 1024, 1024, 10)  # 2.9M weights
BATCH = 128


def mlp(seed=0):
    keys = jax.random.split(jax.random.key(seed), len(WIDTHS))
    return {
        f"layer{i}": {
            "kernel": jax.random.normal(k, (a, b)) * a**-0.5,
            "bias": jnp.zeros(b),
        }
        for i, (k, a, b) in enumerate(zip(keys, WIDTHS[:-1], WIDTHS[1:], strict=False))
    }


def mlp_loss(params, x, y):
    for i in range(len(WIDTHS) - 1):
        x = x @ params[f"layer{i}"]["kernel"] + params[f"layer{i}"]["bias"]
        x = jax.nn.relu(x) if i < len(WIDTHS) - 2 else x
    return optax.softmax_cross_entropy_with_integer_labels(x, y).mean()


def runner(tx, steps):
    """A call that trains ``steps`` steps, each dispatched on its own, as a training loop does."""
    params = mlp()
    state = tx.init(params)
    x = jax.random.normal(jax.random.key(1), (BATCH, WIDTHS[0]))
    y = jax.random.randint(jax.random.key(2), (BATCH,), 0, 10)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(mlp_loss)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    held = [params, state]

    def run():
        for _ in range(steps):
            held[:] = step(*held)
        return held[0]

    return run


def transformer(layers=12, width=64, vocabulary=100):
    """12 x (q, k, v, o, up, down) kernels, norms, an embedding and a head: 73 governed leaves."""
    kernels = {"q": (1, 1), "k": (1, 1), "v": (1, 1), "o": (1, 1), "up": (1, 4), "down": (4, 1)}

    def init(key):
        params = {"embedding": jax.random.normal(key, (vocabulary, width))}
        for i in range(layers):
            keys = jax.random.split(jax.random.fold_in(key, i), len(kernels))
            params[f"block{i}"] = {
                name: {"kernel": jax.random.normal(k, (a * width, b * width)) * (a * width) ** -0.5}
                for k, (name, (a, b)) in zip(keys, kernels.items(), strict=True)
            } | {"norm": {"scale": jnp.ones((2, width))}}
        params["head"] = {"kernel": jax.random.normal(key, (width, vocabulary)) * width**-0.5}
        return params

    def norm(x, scale):
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale

    def loss(params, tokens):
        x = params["embedding"][tokens]
        causal = jnp.tril(jnp.ones((tokens.shape[1], tokens.shape[1]), bool))
        for i in range(layers):
            block = params[f"block{i}"]
            h = norm(x, block["norm"]["scale"][0])
            q, k, v = (
                (h @ block[n]["kernel"]).reshape(*h.shape[:2], 4, -1) for n in ("q", "k", "v")
            )
            scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
            weights = jax.nn.softmax(jnp.where(causal, scores, -1e30))
            h = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
            x = x + h @ block["o"]["kernel"]
            h = norm(x, block["norm"]["scale"][1])
            x = x + jax.nn.gelu(h @ block["up"]["kernel"]) @ block["down"]["kernel"]
        logits = x @ params["head"]["kernel"]
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()

    return init, loss


def compile_seconds(tx):
    """Seconds to trace, lower and compile a fresh training step of the transformer."""
    init, loss = transformer()
    params = init(jax.random.key(0))
    state = tx.init(params)
    tokens = jnp.zeros((4, 32), int)

    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params, tokens), state, params)
        return optax.apply_updates(params, updates), state

    start = time.perf_counter()
    jax.jit(step).lower(params, state).compile()
    return time.perf_counter() - start


def pruned(when, allocate=jp.allocate_uniform):
    def make():
        return jp.prune_gradually(
            optax.adam(1e-3),
            jp.cubic_sparsity(0.9, 1000),
            when=when,
            allocate=allocate,
        )

    return make


def dense():
    return optax.adam(1e-3)


def main(argv=None):
    options = _timing.parser(__doc__)
    options.add_argument("--turns", type=int, default=25, help="how often each step is compiled")
    args = options.parse_args(argv)
    repeats, steps = (3, 10) if args.quick else (40, 10)
    makers = {
        "dense": dense,
        "dense again": dense,
        "uniform, every 10": pruned(jp.every(10)),
        "global, every 10": pruned(jp.every(10), jp.allocate_global),
        "masked, no updates": pruned(jp.every(1, begin=10**9)),
    }
    runs = {name: runner(make(), steps) for name, make in makers.items()}
    seconds = _timing.interleaved(runs, repeats, "steps")
    names = [name for name in runs if name != "dense"]
    ratios = {name: _timing.ratio(seconds[name], seconds["dense"]) for name in names}
    medians = {name: 1e3 * float(np.median(s)) / steps for name, s in seconds.items()}
    rows = [["step of the 2.9M MLP", "ms", "/ dense"]]
    rows += [[name, f"{medians[name]:.2f}", f"{ratios.get(name, 1.0):.3f}"] for name in runs]
    print(_timing.table(rows))

    turns = 1 if args.quick else args.turns
    programs = "dense", "uniform, every 10", "global, every 10"  # the others are compiled the same
    compiling: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(turns):
        for name in compiling:
            compiling[name].append(compile_seconds(makers[name]()))
    compared = {name: _timing.ratio(s, compiling["dense"]) for name, s in compiling.items()}
    rows = [["compiling the transformer's step", "s", "/ dense"]]
    rows += [
        [name, f"{np.median(s):.2f}", f"{compared[name]:.2f}"] for name, s in compiling.items()
    ]
    print("\n" + _timing.table(rows))
    results = {"step ms": medians, "step / dense": ratios, "compile / dense": compared}
    _timing.save("step", results | {"compile s": compiling}, args.out)


if __name__ == "__main__":
    main()
