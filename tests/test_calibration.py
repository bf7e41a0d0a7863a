"""What the matmuls see, against plain NumPy on the inputs written down by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


X = normal(6, 8)
WEIGHTS = {  # a leaf "w", how it is read, its fan-in axes
    "plain": (normal(8, 5), lambda w, x: x @ w, (0,)),
    "rows": (normal(5, 8), lambda w, x: x @ w.T, (1,)),
    "weight first": (normal(5, 8), lambda w, x: w @ x.T, (1,)),
    "heads in": (normal(8, 3, 4), lambda w, x: jnp.einsum("td,dhk->thk", x, w), (0,)),
    "heads out": (
        normal(2, 4, 5),
        lambda w, x: jnp.einsum("thk,hkd->td", x.reshape(6, 2, 4), w),
        (0, 1),
    ),
    "split": (normal(8, 6), lambda w, x: jnp.einsum("td,dhk->thk", x, w.reshape(8, 2, 3)), (0,)),
    "merged": (normal(2, 4, 5), lambda w, x: x @ w.reshape(8, 5), (0, 1)),
    "moved": (normal(4, 5, 2), lambda w, x: x @ w.transpose(2, 0, 1).reshape(8, 5), (0, 2)),
    "cast": (normal(8, 5).astype(jnp.bfloat16), lambda w, x: x @ w.astype(jnp.float32), (0,)),
    "scaled": (normal(8, 5), lambda w, x: x @ (w * jnp.full((8, 5), 0.5) / 2.0), (0,)),
    "masked": (normal(8, 5), lambda w, x: x @ jnp.where(jnp.eye(8, 5) > 0, w, 0.0), (0,)),
    "columns": (normal(8, 5), lambda w, x: (x @ w[:, :2]).sum() + (0 * x @ w[:, 2:]).sum(), (0,)),
    "broadcast": (
        normal(8, 5),
        lambda w, x: jnp.matmul(x[:, None], jnp.broadcast_to(w[None], (6, 8, 5))),
        (0,),
    ),
    "jit": (normal(8, 5), lambda w, x: jax.jit(lambda w: x @ w)(w), (0,)),
    "remat": (normal(8, 5), lambda w, x: jax.checkpoint(lambda w: x @ w)(w), (0,)),
    "cond": (
        normal(8, 5),
        lambda w, x: lax.cond(x[0, 0] < 9, lambda w: x @ w, lambda w: 0 * (x @ w), w),
        (0,),
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_grams_and_axes(name):
    w, read, axes = WEIGHTS[name]

    def apply(p, x):
        return read(p["w"], x)

    params = {"w": w}
    assert jp.fan_in_axes(apply, params, X) == {"w": axes}
    gram = jp.input_grams(apply, params, [X, X[:6] * 2], prunable=jp.matching("w"))["w"]
    want = 5 * np.asarray(X, np.float64).T @ np.asarray(X, np.float64)
    if name == "moved":  # the fan-in is read as (2, 4) and kept as (4, 2)
        order = np.arange(8).reshape(2, 4).T.ravel()
        want = want[np.ix_(order, order)]
    np.testing.assert_allclose(np.asarray(gram), want, rtol=2e-5, atol=2e-5)
    assert gram.axes == axes
    assert gram.matrix.dtype == jnp.float32


@jax.custom_jvp
def through_jvp(w, x):
    return x @ w


through_jvp.defjvp(lambda primals, tangents: (through_jvp(*primals), primals[1] @ tangents[0]))


@jax.custom_vjp
def through_vjp(w, x):
    return x @ w


through_vjp.defvjp(lambda w, x: (x @ w, (w, x)), lambda saved, g: (saved[1].T @ g, g @ saved[0].T))


@pytest.mark.parametrize("call", [through_jvp, through_vjp])
def test_custom_derivatives(call):
    gram = jp.input_grams(lambda p, x: call(p["w"], x), {"w": normal(8, 5)}, [X])["w"]
    np.testing.assert_allclose(gram, X.T @ X, rtol=1e-5)


def test_layers_stacked_by_scan_have_a_gram_each():
    stack = normal(3, 8, 8)

    def apply(p, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    gram = jp.input_grams(apply, {"w": stack}, [X])["w"]
    assert (gram.axes, gram.stack, gram.matrix.shape) == ((1,), (0,), (3, 8, 8))
    norms = jp.input_norms(apply, {"w": stack}, [X])["w"]
    assert norms.shape == (3, 8, 1)
    x = np.asarray(X)
    for i in range(3):
        np.testing.assert_allclose(gram.matrix[i], x.T @ x, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(norms[i, :, 0], np.linalg.norm(x, axis=0), rtol=1e-4)
        x = np.tanh(x @ np.asarray(stack[i]))


def test_loops_over_time_and_indexed_layers_add_up():
    w, stack = normal(8, 8), normal(2, 8, 8)

    def recurrent(p, x):
        return lax.scan(lambda h, _: (jnp.tanh(h @ p["w"]), None), x, None, length=3)[0]

    def loop(p, x):
        return lax.fori_loop(0, 2, lambda i, h: jnp.tanh(h @ p["w"][i]), x)

    def turning(p, x):
        def body(state):
            h, i, p = state
            return jnp.tanh(h @ p["w"]), i + 1, p

        return lax.while_loop(lambda state: state[1] < 3, body, (x, 0, p))[0]

    steps = [np.asarray(X)]
    for _ in range(2):
        steps.append(np.tanh(steps[-1] @ np.asarray(w)))
    want = sum(x.T @ x for x in steps)
    for apply in (recurrent, turning):
        gram = jp.input_grams(apply, {"w": w}, [X])["w"]
        np.testing.assert_allclose(gram, want, rtol=1e-4, atol=1e-4)
    gram = jp.input_grams(loop, {"w": stack}, [X])["w"]
    after = np.tanh(np.asarray(X) @ np.asarray(stack[0]))
    assert gram.stack == (0,)
    np.testing.assert_allclose(gram.matrix[1], after.T @ after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolutions_by_patches(groups):
    x, w = normal(2, 5, 5, 4), normal(3, 3, 4 // groups, 8)

    def apply(p, x):
        return lax.conv_general_dilated(
            x,
            p["w"],
            (2, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    gram = jp.input_grams(apply, {"w": w}, [x])["w"]
    assert gram.axes == (0, 1, 2)
    matrix = np.asarray(gram).reshape(groups, 36 // groups, 36 // groups)
    # The output's energy follows from the Gram, for these weights and so for any.
    rows = np.moveaxis(np.asarray(w), -1, 0).reshape(groups, 8 // groups, -1)
    energy = np.einsum("gon,gnm,gom->go", rows, matrix, rows).ravel()
    out = np.asarray(apply({"w": w}, x))
    np.testing.assert_allclose(energy, (out**2).sum((0, 1, 2)), rtol=1e-4)
    norms = jp.input_norms(apply, {"w": w}, [x])["w"]
    assert norms.shape == (3, 3, 4 // groups, 1 if groups == 1 else 8)
    diagonal = np.diagonal(matrix, axis1=1, axis2=2)
    want = np.sqrt(np.repeat(diagonal, norms.shape[-1] // groups, 0)).T
    np.testing.assert_allclose(norms.reshape(want.shape), want, rtol=1e-5)


def test_wide_grams_are_symmetric():
    x = normal(16, 600)
    gram = np.asarray(jp.input_grams(lambda p, x: x @ p["w"], {"w": normal(600, 2)}, [x])["w"])
    np.testing.assert_array_equal(gram, gram.T)
    np.testing.assert_allclose(gram, x.T @ x, rtol=1e-4, atol=1e-4)


def test_a_leaf_used_twice_adds_up():
    def apply(p, x):
        return jnp.tanh(x @ p["w"]) @ p["w"]

    w = normal(8, 8)
    gram = jp.input_grams(apply, {"w": w}, [X])["w"]
    after = np.tanh(np.asarray(X @ w))
    np.testing.assert_allclose(gram, X.T @ X + after.T @ after, rtol=1e-4, atol=1e-4)


def test_weights_that_no_matmul_reads():
    params = {"w": normal(8, 5), "scale": normal(6, 5), "table": normal(4, 8)}

    def apply(p, x):
        return (x + p["table"][jnp.zeros(6, jnp.int32)]) @ p["w"] * p["scale"]

    really = jp.matmul_weights(apply, params, X)
    assert [really(name, leaf) for name, leaf in params.items()] == [True, False, False]
    with pytest.raises(ValueError, match=r"scale.*matmul_weights"):
        jp.input_norms(apply, params, [X], prunable=jp.matching("w|scale"))
    with pytest.raises(ValueError, match=r"table.*lost at gather"):
        jp.input_grams(apply, params, [X], prunable=jp.matching("table"))
    with pytest.raises(ValueError, match="no batches"):
        jp.input_grams(apply, params, [], prunable=really)


def test_a_leaf_contracted_over_different_axes_is_refused():
    def tied(p, x):
        return jnp.tanh(x @ p["w"]) @ p["w"].T

    with pytest.raises(ValueError, match=r"w: one matmul contracts"):
        jp.fan_in_axes(tied, {"w": normal(8, 5)}, X)


def test_batches_stream_through_one_compilation():
    traces = []

    def apply(p, x, y):
        traces.append(1)
        return x @ p["w"] + y

    batches = ((normal(4, 8), normal(4, 5)) for _ in range(5))
    jp.input_grams(apply, {"w": normal(8, 5)}, batches)
    assert len(traces) <= 2  # once to find the matmuls, once to compile


def test_eight_devices_equal_one():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x, params = normal(16, 8), {"a": normal(8, 8), "b": normal(8, 4)}

    def apply(p, x):
        return jnp.tanh(x @ p["a"]) @ p["b"]

    one = jp.input_grams(apply, params, [x])
    many = jp.input_grams(apply, params, [jax.device_put(x, NamedSharding(mesh, P("data")))])
    for name in params:
        np.testing.assert_allclose(one[name], many[name], rtol=1e-5, atol=1e-5)


def test_fan_in_axes_serve_as_axis():
    params = {"a": {"kernel": normal(8, 4)}, "b": normal(4)}
    axes = jp.fan_in_axes(lambda p, x: x @ p["a"]["kernel"] + p["b"][None], params, X)
    masks = jp.mask_n_m(jp.magnitude(jp.select(params)), 2, 4, axis=axes)
    assert np.asarray(masks["a"]["kernel"]).reshape(2, 4, 4).sum(1).tolist() == [[2] * 4] * 2
