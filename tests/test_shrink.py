"""The law: a shrunk model is the masked model, in values and in gradients."""

import gc
import weakref

import architectures
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from architectures import CASES, case, normal
from flax import nnx

import jaxprune as jp
from jaxprune.channels.masks import axes_kept, channels_alive

DTYPE_PROMOTION = "standard"  # the frameworks' own layers promote


def is_float(leaf):
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def random_scores(params, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(rng.uniform(size=p.shape), jnp.float32) if is_float(p) else None,
        params,
    )


def cut(tree, masks, groups):
    """What is left of a tree like params, by NumPy."""
    kept = axes_kept(groups, channels_alive(masks, groups))
    leaves, structure = jax.tree.flatten(tree)
    for i, axes in kept.items():
        for axis, alive in axes.items():
            leaves[i] = np.compress(alive, leaves[i], axis)
    return jax.tree.unflatten(structure, leaves)


def value_and_gradients(c, apply, params, args):
    """Outputs, and gradients of all floating leaves of a random projection of the output."""
    leaves, structure = jax.tree.flatten(params)
    moving = [i for i, leaf in enumerate(leaves) if is_float(leaf)]

    def loss(floats):
        full = list(leaves)
        for i, leaf in zip(moving, floats, strict=True):
            full[i] = leaf
        out = apply(jax.tree.unflatten(structure, full), *args)
        y = out[0] if c.has_state else out
        return jnp.sum(y * normal(*y.shape, seed=9)), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))([leaves[i] for i in moving])
    full = [np.zeros(np.shape(leaf)) for leaf in leaves]
    for i, grad in zip(moving, grads, strict=True):
        full[i] = np.asarray(grad)
    return out, jax.tree.unflatten(structure, full)


def close(ours, theirs, scale=None):
    theirs = np.asarray(theirs, np.float64)
    assert np.isfinite(theirs).all()
    scale = np.abs(theirs).max() if scale is None else scale
    np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.usual(
    *("mlp", "densenet", "decoder", "experts", "grouped", "haiku", "lstm", "nnx attention"),
    *("resnet", "tied", "unet"),
)
@pytest.mark.parametrize("name", CASES)
def test_shrunk_is_masked(name):
    c = case(name)
    groups = jp.channel_groups(c.apply, c.params, *c.args, has_state=c.has_state)
    masks = jp.mask_channels(random_scores(c.params), groups, 0.4)
    small_apply, small = jp.shrink(c.apply, c.params, masks, groups)
    assert jax.tree.structure(small) == jax.tree.structure(c.params)
    masked = jp.apply_masks(c.params, masks)

    ours, our_grads = value_and_gradients(c, small_apply, small, c.args)
    theirs, their_grads = value_and_gradients(c, c.apply, masked, c.args)
    if c.has_state:
        (ours, updates), (theirs, full_updates) = ours, theirs
        sizes = [x.size for x in jax.tree.leaves(updates)]
        assert sum(sizes) < sum(x.size for x in jax.tree.leaves(full_updates))
    close(ours, theirs)
    theirs = cut(their_grads, masks, groups)
    largest = max(np.abs(grad).max() for grad in jax.tree.leaves(theirs))
    assert largest > 0
    pairs = zip(jax.tree.leaves(our_grads), jax.tree.leaves(theirs), strict=True)
    for ours, expected in pairs:
        close(ours, expected, largest)


def two_layers(seed=0):
    rng = np.random.default_rng(seed)
    params = {
        "a": jnp.asarray(rng.normal(size=(3, 8)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=(8,)), jnp.float32),
        "c": jnp.asarray(rng.normal(size=(8, 2)), jnp.float32),
    }
    return (lambda p, x: jax.nn.relu(x @ p["a"] + p["b"][None]) @ p["c"]), params, normal(5, 3)


def shrunk(sparsity=0.5):
    apply, params, x = two_layers()
    groups = jp.channel_groups(apply, params, x)
    masks = jp.mask_channels(jp.magnitude(params), groups, sparsity)
    return apply, params, x, masks, groups, *jp.shrink(apply, params, masks, groups)


def test_any_batch_under_jit_vmap_and_jvp():
    apply, params, x, masks, _, small_apply, small = shrunk()
    masked = jp.apply_masks(params, masks)
    for batch in (1, 7):
        x = normal(batch, 3, seed=batch)
        close(jax.jit(small_apply)(small, x), apply(masked, x))
    many = normal(4, 6, 3)
    close(jax.vmap(small_apply, (None, 0))(small, many), jax.vmap(apply, (None, 0))(masked, many))
    ours = jax.jvp(lambda x: small_apply(small, x), (x,), (x,))[1]
    close(ours, jax.jvp(lambda x: apply(masked, x), (x,), (x,))[1])


def test_half_precision_parameters_stay():
    *_, small_apply, small = shrunk()
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), small)
    assert small_apply(half, jnp.ones((2, 3), jnp.bfloat16)).dtype == jnp.bfloat16


def test_no_original_array_is_kept_alive():
    _, params, x, masks, _, small_apply, small = shrunk()
    watch = [weakref.ref(leaf) for leaf in jax.tree.leaves(params)]
    del params, masks
    gc.collect()
    assert [w() for w in watch] == [None] * 3
    assert small_apply(small, x).shape == (5, 2)


def test_custom_derivatives_are_kept():
    @jax.custom_vjp
    def odd(x, scale):
        return jnp.tanh(x) * scale

    odd.defvjp(lambda x, s: (odd(x, s), (x, s)), lambda r, g: (3 * g * r[1], jnp.sum(g * r[0])))

    @jax.custom_jvp
    def strange(x, n):
        return x * n

    strange.defjvp(lambda p, t: (strange(*p), 7 * t[0]))
    _, params, x = two_layers()

    def apply(p, x):
        return strange(odd(x @ p["a"] + p["b"][None], jnp.float32(2)), 3) @ p["c"]

    groups = jp.channel_groups(apply, params, x)
    masks = jp.mask_channels(jp.magnitude(params), groups, 0.5)
    small_apply, small = jp.shrink(apply, params, masks, groups)
    masked = jp.apply_masks(params, masks)
    ours = jax.grad(lambda p: jnp.sum(small_apply(p, x)))(small)
    theirs = jax.grad(lambda p: jnp.sum(apply(p, x)))(masked)
    jax.tree.map(close, ours, cut(theirs, masks, groups))


def test_whole_residual_branch_goes():
    c = case("remat")
    groups = jp.channel_groups(c.apply, c.params, *c.args)
    hidden = groups.where(lambda g: not g.frozen and g.size == 9)
    assert len(hidden) == 2
    scores = random_scores(c.params)
    masks = jp.mask_channels(scores, hidden, 0.5, floor=0, multiple_of=9)
    small_apply, small = jp.shrink(c.apply, c.params, masks, groups)
    assert (
        sorted(p.shape[1] for p in jax.tree.leaves(small) if p.ndim == 2 and p.shape[0] == 6)[0]
        == 0
    )
    masked = jp.apply_masks(c.params, masks)
    close(jax.jit(small_apply)(small, *c.args), c.apply(masked, *c.args))


@pytest.mark.parametrize(
    ("name", "leaf"),
    [
        ("resnet training", "params/Conv_1/kernel:3"),
        ("mobilenet", "params/Conv_1/kernel:3"),
        ("decoder", "layer1/k:1"),
        ("lstm", "params/OptimizedLSTMCell_0/hf/kernel:0"),
    ],
)
def test_a_group_goes_whole_or_is_refused(name, leaf):
    c = case(name)
    groups = jp.channel_groups(c.apply, c.params, *c.args, has_state=c.has_state)
    one = groups.where(lambda g: g.name == leaf)
    masks = jp.mask_channels(random_scores(c.params), one, 0.99, floor=0, multiple_of=one[0].size)
    if name == "lstm":
        with pytest.raises(ValueError, match="emptied"):
            jp.shrink(c.apply, c.params, masks, groups)
        return
    small_apply, small = jp.shrink(c.apply, c.params, masks, groups)
    ours = jax.jit(small_apply)(small, *c.args)
    theirs = c.apply(jp.apply_masks(c.params, masks), *c.args)
    close(*(y[0] if c.has_state else y for y in (ours, theirs)))


@pytest.mark.parametrize(
    "tx",
    [
        optax.sgd(0.1, momentum=0.9),
        optax.adamw(1e-2),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2), optax.ema(0.9)),
        optax.adafactor(1e-2, min_dim_size_to_factor=2),
        optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
        jp.prune_gradually(optax.adam(1e-2), 0.5, when=jp.every(1)),
    ],
    ids=["momentum", "adamw", "chain", "adafactor", "multisteps", "prune_gradually"],
)
def test_optimizer_state_follows(tx):
    apply, params, x, masks, groups, small_apply, small = shrunk()
    grads = jax.grad(lambda p: jnp.sum(apply(p, x) ** 2))(params)
    state = tx.update(grads, tx.init(params), params)[1]
    small_state = jp.shrink_state(tx, state, params, masks, groups)
    expected = jax.eval_shape(tx.init, small)
    assert jax.tree.structure(small_state) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: None if a.shape == b.shape else 1 / 0, small_state, expected)
    grads = jax.grad(lambda p: jnp.sum(small_apply(p, x) ** 2))(small)
    updates, _ = tx.update(grads, small_state, small)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, small)


def test_moments_are_those_of_the_kept_weights():
    apply, params, x, masks, groups, _, _ = shrunk()
    tx = optax.adam(1e-2)
    grads = jax.grad(lambda p: jnp.sum(apply(p, x) ** 2))(params)
    state = tx.update(grads, tx.init(params), params)[1]
    small_state = jp.shrink_state(tx, state, params, masks, groups)
    jax.tree.map(np.testing.assert_array_equal, small_state[0].nu, cut(state[0].nu, masks, groups))


def test_state_that_cannot_be_matched_is_refused():
    _, params, _, masks, groups, _, _ = shrunk(0.75)
    tx = optax.adafactor(1e-2, min_dim_size_to_factor=3)
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"a: .*start again with tx.init"):
        jp.shrink_state(tx, state, params, masks, groups)
    with pytest.raises(ValueError, match="structures differ"):
        jp.shrink_state(optax.adam(1e-2), state, params, masks, groups)
    with pytest.raises(ValueError, match="z: no leaf of the groups"):
        jp.shrink_state(tx, state, {"z": params["a"]}, masks, groups)


@pytest.mark.parametrize("name", ["resnet training", "nnx resnet"])
def test_state_of_the_trained_part_follows(name):
    c = case(name)
    groups = jp.channel_groups(c.apply, c.params, *c.args, has_state=True)
    masks = jp.mask_channels(random_scores(c.params), groups, 0.4)
    _, small = jp.shrink(c.apply, c.params, masks, groups)
    if name == "nnx resnet":
        trained, small = (nnx.filter_state(p, nnx.Param) for p in (c.params, small))
    else:
        trained, small = c.params["params"], small["params"]
    tx = optax.adam(1e-2)
    state = jp.shrink_state(tx, tx.init(trained), trained, masks, groups)
    expected = jax.eval_shape(tx.init, small)
    shapes, wanted = (jax.tree_util.tree_leaves_with_path(tree) for tree in (state, expected))
    assert [(path, jnp.shape(x)) for path, x in shapes] == [(path, x.shape) for path, x in wanted]


def test_flops_are_counted_by_leaf():
    apply, params, x, *_ = shrunk()
    counted = jp.flops(apply, params, x)
    assert counted.leaves == {"a": 2 * 5 * 3 * 8, "c": 2 * 5 * 8 * 2}
    assert counted.total == 400
    assert "total" in str(counted)
    *_, small_apply, small = shrunk(0.5)
    assert jp.flops(small_apply, small, x).total == 200

    def looped(p, x):
        return jax.lax.scan(lambda y, _: (y @ p["w"], None), x, None, length=3)[0]

    assert jp.flops(looped, {"w": jnp.ones((4, 4))}, jnp.ones((2, 4))).leaves["w"] == 3 * 64
    image, kernel = jnp.ones((1, 6, 6, 4)), {"k": jnp.ones((3, 3, 1, 8))}
    depthwise = jp.flops(
        lambda p, x: jax.lax.conv_general_dilated(
            x,
            p["k"],
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=4,
        ),
        kernel,
        image,
    )
    assert depthwise.total == 2 * 4 * 4 * 8 * 9
    attention = jp.flops(lambda p, x: (x @ p["w"]) @ x.T, {"w": jnp.ones((4, 4))}, jnp.ones((2, 4)))
    assert attention.others == 2 * 2 * 4 * 2


def test_bad_input_is_refused():
    apply, params, x, masks, groups, small_apply, small = shrunk()
    other = {**masks, "b": jnp.ones(8, bool)}
    with pytest.raises(ValueError, match=r"removed here.*kept in b"):
        jp.shrink(apply, params, other, groups)
    other = {**masks, "b": None}
    with pytest.raises(ValueError, match=r"removed here.*kept in b"):
        jp.shrink(apply, params, other, groups)
    other = {**masks, "a": jp.mask_topk(jp.magnitude({"a": params["a"]}), {"a": 12})["a"]}
    with pytest.raises(ValueError, match="a: the mask does not remove whole channels"):
        jp.shrink(apply, params, other, groups)
    frozen = {"a": None, "b": None, "c": jnp.ones((8, 2), bool).at[:, 0].set(False)}
    with pytest.raises(ValueError, match=r"c: .*frozen \(an output of the model\)"):
        jp.shrink(apply, params, frozen, groups)
    with pytest.raises(TypeError, match="a: the mask is traced"):
        jax.jit(lambda m: jp.shrink(apply, params, m, groups)[1])(masks)
    with pytest.raises(TypeError, match=r"groups\.where"):
        jp.shrink(apply, params, masks, list(groups))
    with pytest.raises(ValueError, match="a: the mask is int32"):
        jp.shrink(apply, params, {**masks, "a": jnp.ones((3, 8), jnp.int32)}, groups)
    with pytest.raises(ValueError, match="d"):
        jp.shrink(apply, {**params, "d": x}, masks, groups)
    nothing = jax.tree.map(lambda p: jnp.zeros(p.shape, bool), params)
    with pytest.raises(ValueError, match="emptied"):
        jp.shrink(apply, params, nothing, groups)
    with pytest.raises(ValueError, match=r"a: small_apply takes shape \(3, 4\)"):
        small_apply(params, x)
    with pytest.raises(ValueError, match="structure"):
        small_apply({"a": small["a"]}, x)
    with pytest.raises(ValueError, match=r"cannot be traced.*\(5, 4\)"):
        small_apply(small, jnp.ones((5, 4)))


def test_every_architecture_has_its_test():
    assert {"mlp", "vgg", "resnet", "unet", "decoder", "experts"} <= architectures.CASES.keys()
