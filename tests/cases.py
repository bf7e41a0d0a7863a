"""The tables that every law sweeps: a new method or optimizer inherits all tests with one row."""

from functools import cache, partial
from itertools import cycle

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune as jp

KEY = jax.random.key(7)

OPTIMIZERS = {
    "momentum": lambda: optax.sgd(0.05, momentum=0.9),
    "adam": lambda: optax.adam(0.01),
    "adamw": lambda: optax.adamw(0.01, weight_decay=0.1),
    "lion": lambda: optax.lion(0.003, weight_decay=0.1),
    "adafactor": lambda: optax.adafactor(0.01, min_dim_size_to_factor=4),
    "clip_adamw": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(0.01, 60))
    ),
    "multisteps": lambda: optax.MultiSteps(
        optax.adamw(0.01), every_k_schedule=2
    ).gradient_transformation(),
    "sgd": lambda: optax.sgd(0.05),
    "nesterov": lambda: optax.sgd(0.05, momentum=0.9, nesterov=True),
    "nadamw": lambda: optax.nadamw(0.01),
    "radam": lambda: optax.radam(0.01),
    "rmsprop": lambda: optax.rmsprop(0.01, momentum=0.9),
    "adagrad": lambda: optax.adagrad(0.05),
    "rprop": lambda: optax.rprop(0.01),
    "lamb": lambda: optax.lamb(0.01),
    "adabelief": lambda: optax.adabelief(0.01),
    "muon": lambda: optax.contrib.muon(0.01),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=0.01),
    "schedule_free": lambda: optax.contrib.schedule_free_adamw(0.01),
    "prodigy": lambda: optax.contrib.prodigy(0.1),
    "partition": lambda: optax.partition(
        {"wide": optax.adamw(0.01), "rest": optax.sgd(0.05)},
        lambda params: jax.tree.map(lambda p: "wide" if p.ndim > 1 else "rest", params),
    ),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adamw(0.01), 5),
    "masked": lambda: optax.chain(
        optax.masked(
            optax.add_decayed_weights(0.1), lambda p: jax.tree.map(lambda w: w.ndim > 1, p)
        ),
        optax.sgd(0.05, momentum=0.9),
    ),
}
REQUIRED = ("momentum", "adamw", "adafactor")

WHEN = jp.every(3, begin=1, end=8)

SIZE = 3 * 3 * 2 * 4 + 36 * 16 + 16 * 5  # governed weights of params()

METHODS = {
    "movement": lambda inner, s, **kw: jp.prune_gradually(
        inner, jp.cubic_sparsity(s, 7), when=WHEN, saliency=jp.movement, **kw
    ),
    "ac_dc": lambda inner, s, **kw: jp.ac_dc(inner, s, begin=0, period=2, end=8, **kw),
    "granet": lambda inner, s, **kw: jp.granet(
        inner, jp.cubic_sparsity(s, 7), when=WHEN, key=KEY, **kw
    ),
    "train_straight_through": lambda inner, s, **kw: jp.train_straight_through(
        inner, s, when=WHEN, **kw
    ),
    "sr_ste": lambda inner, s, **kw: jp.sr_ste(inner, s, when=jp.every(1), decay=0.01, **kw),
    "top_kast": lambda inner, s, **kw: jp.top_kast(inner, s, when=WHEN, **kw),
    "prune_gradually": lambda inner, s, **kw: jp.prune_gradually(
        inner, jp.cubic_sparsity(s, 7, begin=1), when=WHEN, **kw
    ),
    "prune_global_taylor": lambda inner, s, **kw: jp.prune_gradually(
        inner, s, when=WHEN, saliency=jp.taylor, allocate=jp.allocate_global, **kw
    ),
    "prune_gradient_erk": lambda inner, s, **kw: jp.prune_gradually(
        inner,
        jp.cubic_sparsity(s, 7),
        when=WHEN,
        saliency=jp.gradient_magnitude,
        allocate=jp.allocate_erk,
        **kw,
    ),
    "prune_lamp": lambda inner, s, **kw: jp.prune_gradually(
        inner, jp.cubic_sparsity(s, 7), when=WHEN, allocate=jp.allocate_lamp, **kw
    ),
    "prune_random_packed": lambda inner, s, **kw: jp.prune_gradually(
        inner, s, when=WHEN, saliency=jp.random_saliency, key=KEY, packed=True, **kw
    ),
    "prune_below": lambda inner, s, **kw: jp.prune_below(
        inner, 0.2 * s, when=WHEN, saliency=jp.magnitude, **kw
    ),
    "rigl": lambda inner, s, **kw: jp.rigl(inner, s, drop_fraction=0.3, when=WHEN, key=KEY, **kw),
    "sparse_evolutionary": lambda inner, s, **kw: jp.sparse_evolutionary(
        inner, s, drop_fraction=0.3, when=WHEN, key=KEY, **kw
    ),
}
EXACT = [name for name in METHODS if name != "prune_below"]
REGROWING = ("rigl", "sparse_evolutionary", "ac_dc", "granet")
LATENT = ("train_straight_through", "sr_ste", "top_kast")
CONSTANT = ("rigl", "sparse_evolutionary")  # the number of kept weights never changes

USUAL = ("movement", "prune_gradually", "prune_lamp", "rigl", "train_straight_through")
"""Methods that differ in how they keep their state, for laws that take minutes over all."""

REFUSED = [(method, "schedule_free") for method in LATENT]


def pairs(full):
    """Which (method, optimizer) the laws sweep: all, or each optimizer once and some with more."""
    if full:
        return [(m, o) for m in METHODS for o in OPTIMIZERS if (m, o) not in REFUSED]
    usual = [(m, o) for m in ("prune_gradually", "rigl") for o in REQUIRED]
    once = [pair for pair in zip(cycle(METHODS), OPTIMIZERS, strict=False) if pair not in REFUSED]
    left = [o for o in OPTIMIZERS if o not in (pair[1] for pair in once)]
    return list(dict.fromkeys([*usual, *once, *(("prune_gradually", o) for o in left)]))


SALIENCIES = {
    "magnitude": jp.magnitude,
    "gradient_magnitude": jp.gradient_magnitude,
    "taylor": jp.taylor,
    "random_saliency": partial(jp.random_saliency, key=KEY),
}
ALLOCATIONS = {
    "uniform": jp.allocate_uniform,
    "erk": jp.allocate_erk,
    "global": jp.allocate_global,
    "lamp": jp.allocate_lamp,
}


def params(dtype=jnp.float32, seed=0):
    """A small convolution, two dense layers, a norm and an embedding."""
    shapes = {
        "conv": {"kernel": (3, 3, 2, 4), "bias": (4,)},
        "dense": {"kernel": (36, 16)},
        "norm": {"scale": (16,)},
        "embed": {"embedding": (5, 16)},
        "head": {"kernel": (16, 5), "bias": (5,)},
    }
    flat, tree = jax.tree.flatten(shapes, is_leaf=lambda v: isinstance(v, tuple))
    keys = jax.random.split(jax.random.key(seed), len(flat))
    leaves = [
        (0.5 * jax.random.normal(k, s)).astype(dtype) for k, s in zip(keys, flat, strict=True)
    ]
    return jax.tree.unflatten(tree, leaves)


def loss(p, step):
    """Smooth, moves every weight, and differs from step to step."""
    total = jnp.zeros((), jnp.float32)
    for i, leaf in enumerate(jax.tree.leaves(p)):
        wave = jnp.sin(jnp.arange(leaf.size, dtype=jnp.float32).reshape(leaf.shape) + i + step)
        total += jnp.sum(jnp.square(leaf.astype(jnp.float32) - wave))
    return total


def stepper(tx):
    """One jitted training step: ``step(params, state, t) -> (params, state)``."""

    @jax.jit
    def step(p, state, t):
        updates, state = tx.update(jax.grad(loss)(p, t), state, p)
        return optax.apply_updates(p, updates), state

    return step


def run(tx, p, steps, *, step=None):
    """Train; returns params, state and the trajectory of both."""
    step, state, path = step or stepper(tx), tx.init(p), []
    for t in range(steps):
        p, state = step(p, state, jnp.float32(t))
        path.append((p, state))
    return p, state, path


@cache
def trained(method, optimizer="adamw", steps=12, sparsity=0.7):
    """A run shared by the laws, with what it takes to go on: ``(tx, step, trajectory)``."""
    tx = METHODS[method](OPTIMIZERS[optimizer](), sparsity)
    step = stepper(tx)
    return tx, step, run(tx, params(), steps, step=step)[2]


def kept(masks):
    """Kept weights per path."""
    pairs = jax.tree_util.tree_leaves_with_path(masks)
    return {jax.tree_util.keystr(path): int(mask.sum()) for path, mask in pairs}


def total(masks):
    return sum(kept(masks).values())


def dead_are_zero(p, masks):
    """Assert that pruned weights are exactly zero."""

    def check(leaf, mask):
        if mask is not None:
            assert not np.any(np.asarray(leaf, np.float32)[~np.asarray(mask)])

    jax.tree.map(check, p, masks, is_leaf=lambda v: v is None)
