"""The law on programs that no layer library writes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from shrinkable import Case, normal
from test_shrink import close, cut, random_scores, value_and_gradients

import jaxprune as jp

DTYPE_PROMOTION = "standard"


def conv(x, kernel, groups=1, padding="SAME"):
    return lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


@jax.custom_vjp
def rms(x, scale):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale[None]


def _rms_forward(x, scale):
    inverse = lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    return x * inverse * scale[None], (x, inverse, scale)


def _rms_backward(residuals, g):
    x, inverse, scale = residuals
    inner = jnp.mean(g * scale[None] * x, -1, keepdims=True)
    return inverse * (g * scale[None] - x * inverse**2 * inner), jnp.sum(g * x * inverse, 0)


rms.defvjp(_rms_forward, _rms_backward)


@jax.custom_vjp
def by_width(x):
    return x


by_width.defvjp(lambda x: (x, x.shape[1]), lambda n, g: (g / n,))


def swap(p, x):
    def step(carry, _):
        return (carry[1], jnp.tanh(carry[0] @ p["w"])), carry[0].sum(1)

    (a, b), sums = lax.scan(step, (x @ p["a"], x @ p["c"]), None, length=3)
    return (a + b) @ p["b"] + sums.sum()


def branches_in_loop(p, x):
    def step(carry, i):
        return lax.switch(
            i % 2, [lambda c: jnp.tanh(c @ p["w"]), lambda c: c * p["s"]], carry
        ), None

    return lax.scan(step, x @ p["a"], jnp.arange(3))[0] @ p["b"]


def quantised(p, x):
    h = x @ p["a"]
    distances = jnp.sum((h[:, None] - p["c"][None]) ** 2, -1)
    return p["c"][jnp.argmin(distances, 1)] @ p["b"] + h @ p["b"]


def descended(p, x):
    def f(q):
        return jax.nn.relu(x @ q["a"]) @ q["b"]

    grads = jax.grad(lambda q: jnp.sum(f(q) ** 2))(p)
    return f(jax.tree.map(lambda w, g: w - 0.1 * g, p, grads))


def fused_heads(p, x):
    """Queries, keys and values from one projection, three outermost."""
    rows, width = x.shape[0], p["a"].shape[0]
    fused = ((x @ p["in"]) @ p["a"]).reshape(rows, 3, 4, 2).transpose(1, 2, 0, 3)
    q, k, v = fused[0], fused[1], fused[2]
    mixed = jax.nn.softmax(q @ jnp.swapaxes(k, 1, 2)) @ v
    return (jnp.swapaxes(mixed, 0, 1).reshape(rows, 8) @ p["b"]).reshape(rows, width) @ p["out"]


IMAGE, ROWS = normal(2, 6, 6, 2), normal(3, 4)
PROGRAMS = {
    "negative padding": (
        lambda p, x: lax.pad(x @ p["a"], np.float32(0.0), ((0, 0, 0), (-2, 1, 0))) @ p["b"],
        {"a": (4, 8), "b": (7, 2)},
    ),
    "interior padding": (
        lambda p, x: lax.pad(x @ p["a"], np.float32(0.0), ((0, 0, 0), (-3, -3, 2))) @ p["b"],
        {"a": (4, 8), "b": (16, 2)},
    ),
    "padding by one": (
        lambda p, x: lax.pad(x @ p["a"], np.float32(1.0), ((0, 0, 0), (1, 2, 0))) @ p["b"],
        {"a": (4, 8), "b": (11, 2)},
    ),
    "shuffled channels": (
        lambda p, x: jnp.swapaxes((x @ p["a"]).reshape(3, 2, 6), 1, 2).reshape(3, 12) @ p["b"],
        {"a": (4, 12), "b": (12, 2)},
    ),
    "two groupings": (
        lambda p, x: conv(conv(x @ p["a"], p["k"], 4), p["q"], 6).mean((1, 2)) @ p["b"],
        {"a": (2, 8), "k": (3, 3, 2, 12), "q": (3, 3, 2, 12), "b": (12, 3)},
    ),
    "cropped groups": (
        lambda p, x: conv(x @ p["a"], p["k"], 4, [(-1, 2), (0, 1)])[..., 3:].mean((1, 2)) @ p["b"],
        {"a": (2, 8), "k": (3, 3, 2, 12), "b": (9, 3)},
    ),
    "carries swap": (swap, {"a": (4, 8), "c": (4, 8), "w": (8, 8), "b": (8, 2)}),
    "branches in a loop": (branches_in_loop, {"a": (4, 8), "w": (8, 8), "s": (1, 8), "b": (8, 2)}),
    "residuals": (
        lambda p, x: rms(x @ p["a"], p["s"]) @ p["b"],
        {"a": (4, 8), "s": (8,), "b": (8, 2)},
    ),
    "width in a derivative": (
        lambda p, x: by_width(x @ p["a"]) @ p["b"],
        {"a": (4, 8), "b": (8, 2)},
    ),
    "fused heads": (fused_heads, {"in": (4, 6), "a": (6, 24), "b": (8, 6), "out": (6, 2)}),
    "codebook": (quantised, {"a": (4, 8), "c": (5, 8), "b": (8, 2)}),
    "a gradient step inside": (descended, {"a": (4, 8), "b": (8, 2)}),
    "rows by index": (
        lambda p, x: jnp.zeros((5, 8)).at[jnp.array([0, 2, 2])].add(x @ p["a"]) @ p["b"],
        {"a": (4, 8), "b": (8, 2)},
    ),
    "one weight twice": (
        lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"]) @ p["w"] @ p["w"].T) @ p["b"],
        {"a": (4, 8), "w": (8, 8), "b": (8, 2)},
    ),
}


def law(apply, params, *args):
    groups = jp.channel_groups(apply, params, *args)
    exact = groups.where(lambda g: g.exact and not g.frozen)
    masks = jp.mask_channels(random_scores(params), exact, 0.1)
    small_apply, small = jp.shrink(apply, params, masks, groups)
    assert sum(p.size for p in jax.tree.leaves(small)) < sum(
        p.size for p in jax.tree.leaves(params)
    )
    return masks, groups, small_apply, small, jp.apply_masks(params, masks)


@pytest.mark.parametrize("name", PROGRAMS)
def test_law_on_odd_programs(name):
    apply, shapes = PROGRAMS[name]
    params = {leaf: normal(*shape, seed=i) for i, (leaf, shape) in enumerate(shapes.items())}
    args = (IMAGE if shapes["a"][0] == 2 else ROWS,)
    masks, groups, small_apply, small, masked = law(apply, params, *args)
    c = Case(apply, params, args)
    ours, our_grads = value_and_gradients(c, small_apply, small, args)
    theirs, their_grads = value_and_gradients(c, apply, masked, args)
    close(ours, theirs)
    jax.tree.map(close, our_grads, cut(their_grads, masks, groups))


def test_while_loops():
    def apply(p, x):
        def step(carry):
            return carry[0] * p["s"] + jnp.tanh(carry[0] @ p["w"]), carry[1] + 1

        return (
            lax.while_loop(lambda c: jnp.sum(c[0] ** 2) < 99 + c[1], step, (x @ p["a"], 0))[0]
            @ p["b"]
        )

    params = {"a": normal(4, 8), "w": normal(8, 8), "s": normal(1, 8), "b": normal(8, 2)}
    *_, small_apply, small, masked = law(apply, params, ROWS)
    close(jax.jit(small_apply)(small, ROWS), apply(masked, ROWS))


def test_half_precision_programs():
    params = {"a": normal(2, 8), "k": normal(3, 3, 8, 6), "b": normal(6, 3)}
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)

    def apply(p, x):
        return conv(jax.nn.gelu(x.astype(jnp.bfloat16) @ p["a"]), p["k"]) @ p["b"]

    *_, small_apply, small, masked = law(apply, params, IMAGE)
    ours, theirs = (
        np.asarray(f(p, IMAGE), np.float32) for f, p in ((small_apply, small), (apply, masked))
    )
    assert small_apply(small, IMAGE).dtype == jnp.bfloat16
    np.testing.assert_allclose(ours, theirs, rtol=0.02, atol=0.02 * np.abs(theirs).max())


def test_integer_and_key_leaves_pass_through():
    params = {
        "a": normal(4, 8),
        "b": normal(8, 2),
        "stored": jnp.asarray(np.random.default_rng(0).integers(-9, 9, (8, 8)), jnp.int8),
        "count": jnp.int32(3),
        "key": jax.random.key(0),
    }

    def apply(p, x):
        h = x @ p["a"] * jax.random.bernoulli(p["key"], 0.5, (3, 8))
        return jax.nn.relu(h @ p["stored"].astype(jnp.float32)) @ p["b"] * p["count"]

    *_, small_apply, small, _ = law(apply, params, ROWS)
    assert small["stored"].size < 64
    assert small["stored"].dtype == jnp.int8
    assert small["key"].dtype == params["key"].dtype
    full = jax.tree.map(lambda p: p, params)
    masks = law(apply, params, ROWS)[0]
    for name in ("a", "b"):
        full[name] = params[name] * masks[name]
    full["stored"] = params["stored"] * (1 if masks["stored"] is None else masks["stored"])
    close(jax.jit(small_apply)(small, ROWS), apply(full, ROWS))


def test_one_array_at_two_paths():
    w = normal(8, 8)
    params = {"read": w, "write": w, "a": normal(4, 8, seed=2), "b": normal(8, 2)}

    def apply(p, x):
        h = x @ p["a"]
        return (jax.nn.relu(h @ p["read"]) + h @ p["write"].T) @ p["b"]

    *_, small_apply, small, masked = law(apply, params, ROWS)
    assert small["read"].shape == small["write"].shape
    close(small_apply(small, ROWS), apply(masked, ROWS))


def test_heads_of_a_fused_projection_are_units():
    apply, shapes = PROGRAMS["fused heads"]
    params = {leaf: jnp.ones(shape) for leaf, shape in shapes.items()}
    groups = jp.channel_groups(apply, params, ROWS)
    heads = next(g for g in groups if g.name == "a:1")
    assert heads.size == 4
    assert heads.members[0].positions[1].tolist() == [2, 3, 10, 11, 18, 19]
