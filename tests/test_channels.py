"""Groups: what is coupled, what is frozen and why, what is exact; masks of whole channels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import case, normal

import jaxprune as jp
from jaxprune.channels.masks import channels_alive

DTYPE_PROMOTION = "standard"


def groups_of(name):
    c = case(name)
    return c, jp.channel_groups(c.apply, c.params, *c.args, has_state=c.has_state)


def live(groups):
    return {g.name: g for g in groups if not g.frozen}


def places(group):
    return {f"{m.path}:{m.axis}" for m in group.members}


def of(apply, params, *args, **kwargs):
    return jp.channel_groups(apply, params, *args, **kwargs)


def why(apply, shape=(4, 6), tail=(6, 2)):
    """The reason noted for the hidden channels of ``x @ a``, which ``apply`` works on."""
    params = {"a": jnp.ones(shape), "b": jnp.ones(tail)}
    groups = of(lambda p, x: apply(x @ p["a"]) @ p["b"], params, jnp.ones((3, 4)))
    hidden = next(g for g in groups if "a:1" in places(g))
    return ("frozen: " if hidden.frozen else "") + hidden.reason


def test_residual_streams_unite_and_blocks_stay_apart():
    _, groups = groups_of("resnet training")
    found = live(groups)
    assert [g.size for g in found.values()] == [8, 8, 16, 16]
    stem = next(g for g in found.values() if "params/Conv_0/kernel:3" in places(g))
    assert {
        "params/Conv_2/kernel:3",
        "params/BatchNorm_2/scale:0",
        "batch_stats/BatchNorm_2/mean:0",
        "params/Conv_1/kernel:2",
    } <= places(stem)
    assert all(g.exact for g in found.values())


def test_concatenation_moves_positions():
    _, groups = groups_of("densenet")
    sizes = sorted(g.size for g in live(groups).values())
    assert sizes == [4, 4, 6, 7]
    last = next(g for g in live(groups).values() if "params/Conv_2/kernel:3" in places(g))
    reader = next(m for m in last.members if m.path == "params/Conv_3/kernel")
    assert reader.positions.ravel().tolist() == [10, 11, 12, 13]


def test_flatten_follows_the_channel():
    _, groups = groups_of("vgg")
    conv = next(g for g in live(groups).values() if "params/Conv_1/kernel:3" in places(g))
    dense = next(m for m in conv.members if m.path == "params/Dense_0/kernel")
    assert dense.positions[1].tolist() == [1, 9, 17, 25]


def test_units_of_norms_heads_experts_and_grouped_convolutions():
    _, groups = groups_of("groupnorm")
    assert sorted(g.size for g in live(groups).values()) == [4, 4, 4, 4]
    _, groups = groups_of("decoder")
    heads = next(g for g in live(groups).values() if "layer0/q:1" in places(g))
    assert heads.size == 3
    widths = {m.path: m.positions.shape[1] for m in heads.members}
    assert widths == {"layer0/k": 4, "layer0/o": 8, "layer0/q": 8, "layer0/v": 4}
    _, groups = groups_of("experts")
    experts = next(g for g in live(groups).values() if "up:0" in places(g))
    assert places(experts) == {"gate:1", "up:0", "down:0"}
    assert experts.exact
    _, groups = groups_of("mobilenet")
    assert any("params/Conv_2/kernel:3" in places(g) and g.size == 12 for g in groups)
    grouped = next(g for g in live(groups).values() if "params/Conv_6/kernel:3" in places(g))
    assert grouped.size == 3


def test_recurrent_units_are_found():
    for name, size in (("lstm", 7), ("gru", 6), ("equinox attention", 6)):
        _, groups = groups_of(name)
        assert any(g.size == size and g.exact for g in live(groups).values()), name


@pytest.mark.parametrize(
    ("apply", "reason"),
    [
        (lambda h: jnp.argmax(h, 1, keepdims=True) * h, "frozen: argmax over this axis"),
        (lambda h: jnp.sort(h, 1), "frozen: sort along this axis"),
        (lambda h: jnp.cumsum(h, 1), "frozen: cumsum along this axis"),
        (lambda h: h * jax.lax.top_k(h, 2)[0][:, :1], "frozen: top_k along this axis"),
        (lambda h: jnp.fft.fft(h).real, "frozen: unknown primitive fft"),
        (lambda h: h[:, jnp.array([1, 0, 3, 2, 5, 4])], "frozen: looked up by index"),
        (lambda h: jnp.max(h, 1, keepdims=True) * h, "reduce_max over this axis"),
        (lambda h: jax.nn.softmax(h), "reduce_max over this axis"),
        (lambda h: h - jnp.mean(jnp.exp(h), 1, keepdims=True), "reduce_sum over this axis"),
        (lambda h: jnp.exp(h) @ jnp.cos(h).T @ h, "neither factor is zero"),
        (lambda h: h / jnp.square(h), "div of a channel that masking makes zero"),
        (lambda h: h**-2, "integer_pow of a channel that masking makes zero"),
        (lambda h: jnp.abs(h) ** 1.5, ""),
        (lambda h: jnp.abs(h) ** -1.5, "pow of a channel that masking makes zero"),
        (lambda h: jax.lax.rem(jnp.ones_like(h), h), "rem of a channel that masking makes zero"),
        (lambda h: h / jnp.std(h, 0, keepdims=True), "div of a channel that masking makes zero"),
        (lambda h: h / (jnp.std(h, 0, keepdims=True) + 1), ""),
        (lambda h: h * jnp.mean(h * h, 1, keepdims=True), ""),
        (lambda h: (h @ h.T) @ h, ""),
        (lambda h: jax.nn.sigmoid(h) + 1, ""),
        (lambda h: h[:, ::-1][:, ::-1], ""),
    ],
)
def test_reasons(apply, reason):
    found = why(apply)
    assert found.startswith(reason) if reason.startswith("frozen") else reason in found
    assert bool(found) == bool(reason)


def test_inputs_outputs_and_state_freeze_with_reasons():
    params = {"a": jnp.ones((4, 6)), "n": jnp.arange(3), "k": jax.random.key(0)}
    groups = of(lambda p, x: x @ p["a"] + 0 * p["n"][0], params, jnp.ones((3, 4)))
    reasons = {place: g.reason for g in groups for place in places(g) if g.frozen}
    assert reasons["a:0"] == "an input of the model"
    assert reasons["a:1"] == "an output of the model"
    params = {"w": jnp.ones((4, 6)), "mean": jnp.ones(6), "out": jnp.ones((6, 2))}

    def apply(p, x, name="mean"):
        h = x @ p["w"]
        return (h - p["mean"][None]) @ p["out"], {name: h.mean(0)}

    assert live(of(apply, params, jnp.ones((3, 4)), has_state=True))
    assert not live(of(apply, params, jnp.ones((3, 4))))
    other = of(lambda p, x: apply(p, x, "elsewhere"), params, jnp.ones((3, 4)), has_state=True)
    assert "no path of params" in next(g for g in other if "mean:0" in places(g)).reason
    with pytest.raises(ValueError, match="must return"):
        of(lambda p, x: x @ p["w"], params, jnp.ones((3, 4)), has_state=True)


def test_one_array_at_two_paths_is_tied():
    w = jnp.ones((5, 4))
    params = {"embed": w, "head": w, "mlp": jnp.ones((4, 4))}
    groups = of(
        lambda p, t: (p["embed"][t] @ p["mlp"]) @ p["head"].T, params, jnp.zeros(3, jnp.int32)
    )
    (group,) = live(groups).values()
    assert places(group) == {"embed:1", "head:1", "mlp:0", "mlp:1"}


def test_prints_and_picks():
    _, groups = groups_of("vit")
    text = str(groups)
    assert "frozen: an output of the model" in text
    assert text.splitlines()[0].startswith("group")
    some = groups.where(lambda g: not g.frozen)
    assert len(some) == 5
    assert len(some[:2]) == 2
    assert some[0] == next(iter(some))
    assert repr(some) == str(some)


def mlp():
    rng = np.random.default_rng(0)
    params = {
        "a": jnp.asarray(rng.normal(size=(4, 32)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=(32, 16)), jnp.float32),
        "c": jnp.asarray(rng.normal(size=(16, 2)), jnp.float32),
    }
    apply = lambda p, x: jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]  # noqa: E731
    return apply, params, of(apply, params, jnp.ones((3, 4)))


def kept(masks):
    return sum(int(m.sum()) for m in jax.tree.leaves(masks))


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.37, 0.5, 0.9])
def test_target_is_met_by_the_shortest_prefix(sparsity):
    _, params, groups = mlp()
    scores = jp.magnitude(params)
    total = sum(p.size for p in params.values())
    masks = jp.mask_channels(scores, groups, sparsity)
    budget = total - round(sparsity * total)
    assert kept(masks) <= budget
    assert kept(masks) >= budget - 48  # the largest channel

    def rank(group, positions):
        parts = [
            np.moveaxis(np.asarray(scores[m.path]), m.axis, 0)[m.positions.ravel()]
            for m in group.members
        ]
        values = np.concatenate(parts, 1).mean(1)
        return values / values.mean()

    alive = channels_alive(masks, groups)
    values = np.concatenate([rank(g, None) for g in groups if not g.frozen])
    alive = alive[: len(values)]
    if not alive.all():
        assert values[alive].min() >= values[~alive].max() or kept(masks) < 60


def test_flops_target_multiples_and_floors():
    apply, params, groups = mlp()
    scores, x = jp.magnitude(params), jnp.ones((3, 4))
    masks = jp.mask_channels(scores, groups, flops=0.75, multiple_of=4, per_cost=True)
    small_apply, small = jp.shrink(apply, params, masks, groups)
    assert small["a"].shape[1] % 4 == small["b"].shape[1] % 4 == 0
    assert jp.flops(small_apply, small, x).total <= 0.25 * jp.flops(apply, params, x).total
    masks = jp.mask_channels(scores, groups, 0.7, floor=0.25)
    _, small = jp.shrink(apply, params, masks, groups)
    assert small["a"].shape[1] >= 8
    assert small["b"].shape[1] >= 4
    for reduce in (np.sum, np.max, np.linalg.norm):
        for normalise in (np.max, np.linalg.norm, None):
            masks = jp.mask_channels(scores, groups, 0.5, reduce=reduce, normalise=normalise)
            assert kept(masks) <= 336


def test_infinite_scores_rank_as_they_should():
    _, params, groups = mlp()
    scores = jp.magnitude(params)
    first = groups.where(lambda g: g.name == "a:1")
    masks = jp.mask_channels({**scores, "a": scores["a"].at[:, :8].set(jnp.inf)}, first, 0.75)
    assert np.flatnonzero(np.asarray(masks["a"]).any(0)).tolist() == list(range(8))


def test_cost_decides_between_equal_scores():
    params = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 40)), "c": jnp.ones((40, 2))}
    apply = lambda p, x: jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]  # noqa: E731
    groups = of(apply, params, jnp.ones((3, 4)))
    scores = {"a": jnp.ones((4, 8)), "b": None, "c": jnp.ones((40, 2))}
    for target in ({"sparsity": 0.3}, {"flops": 0.3}):
        masks = jp.mask_channels(scores, groups, per_cost=True, normalise=None, **target)
        assert not masks["a"].any(0).all()  # dear: 44 weights a channel
        assert masks["c"].any(1).all()  # cheap: 10 weights a channel


def test_only_scored_and_chosen_groups_lose_channels():
    _, params, groups = mlp()
    first = groups.where(lambda g: g.name == "a:1")
    masks = jp.mask_channels(jp.magnitude(params), first, 0.5)
    assert masks["c"] is None
    assert masks["b"].any(0).all()
    scores = {**jp.magnitude(params), "a": None, "b": None}
    masks = jp.mask_channels(scores, groups, 0.1)
    assert masks["a"].all()
    assert not masks["c"].all()


def test_ties_are_broken_by_index():
    _, params, groups = mlp()
    first = groups.where(lambda g: g.name == "a:1")
    masks = jp.mask_channels(jax.tree.map(jnp.ones_like, params), first, 0.25)
    assert np.flatnonzero(~np.asarray(masks["a"]).any(0)).tolist() == list(range(24, 32))


def test_inexact_groups_wait_to_be_asked():
    params = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 2))}
    groups = of(lambda p, x: jax.nn.softmax(x @ p["a"]) @ p["b"], params, jnp.ones((3, 4)))
    with pytest.raises(ValueError, match="none of these groups"):
        jp.mask_channels(jp.magnitude(params), groups, 0.5)
    masks = jp.mask_channels(jp.magnitude(params), groups, 0.5, inexact=True)
    assert kept(masks) == 24


def test_bad_input_is_refused():
    apply, params, groups = mlp()
    scores = jp.magnitude(params)
    with pytest.raises(ValueError, match=r"sparsity=0.999 cannot be reached.*nearest reachable"):
        jp.mask_channels(scores, groups, 0.999)
    with pytest.raises(ValueError, match="one target"):
        jp.mask_channels(scores, groups)
    with pytest.raises(ValueError, match="one target"):
        jp.mask_channels(scores, groups, 0.5, flops=0.5)
    with pytest.raises(ValueError, match="fraction"):
        jp.mask_channels(scores, groups, 1.5)
    with pytest.raises(ValueError, match="floor"):
        jp.mask_channels(scores, groups, 0.5, floor=-1)
    with pytest.raises(ValueError, match="multiple_of"):
        jp.mask_channels(scores, groups, 0.5, multiple_of=0)
    with pytest.raises(ValueError, match="multiple_of"):
        jp.mask_channels(scores, groups, 0.5, multiple_of=2.5)
    with pytest.raises(TypeError, match="a: the score is traced"):
        jax.jit(lambda s: jp.mask_channels(s, groups, 0.5))(scores)
    with pytest.raises(TypeError, match=r"groups\.where"):
        jp.mask_channels(scores, list(groups), 0.5)
    with pytest.raises(ValueError, match="a: scores have shape"):
        jp.mask_channels({**scores, "a": jnp.ones(3)}, groups, 0.5)
    with pytest.raises(ValueError, match="c: the groups know this leaf"):
        jp.mask_channels({"a": scores["a"], "b": scores["b"]}, groups, 0.5)
    with pytest.raises(ValueError, match="NaN"):
        jp.mask_channels({**scores, "c": scores["c"] * jnp.nan}, groups, 0.5)
    with pytest.raises(TypeError, match="traced"):
        jax.jit(lambda s: jp.mask_channels(scores, groups, s))(0.5)
    with pytest.raises(ValueError, match="no array"):
        jp.channel_groups(apply, {}, jnp.ones((3, 4)))
    with pytest.raises(ValueError, match=r"cannot be traced.*\(3, 5\)"):
        jp.channel_groups(apply, params, jnp.ones((3, 5)))


def random_program(seed, ops=7):
    """A random composition of operations on a matrix of rows and channels."""
    rng = np.random.default_rng(seed)
    params = {"in": jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)}
    plan = []
    for i in range(ops):
        kind = int(rng.integers(0, 14))
        width = int(rng.choice([4, 6, 8]))
        plan.append((kind, width, f"w{i}"))

    def run(p, x, make=None):
        def weight(name, *shape):
            if make is not None:
                make(name, shape)
                return jnp.zeros(shape)
            return p[name]

        h = x @ (p["in"] if make is None else params["in"])
        for kind, width, name in plan:
            n = h.shape[1]
            if kind in (0, 1):
                h = jax.nn.relu(h @ weight(name, n, width))
            elif kind == 2:
                h = h + jnp.tanh(h @ weight(name, n, n))
            elif kind == 3:
                h = jnp.concatenate([h, h @ weight(name, n, width)], 1)
            elif kind == 4:
                h = h[:, ::-1] + h @ weight(name, n, n)
            elif kind == 5:
                h = h[:, 1 : n - 1] if n > 4 else h
            elif kind == 6:
                h = jnp.pad(h, ((0, 0), (1, 2)))
            elif kind == 7 and n % 2 == 0:
                a, b = jnp.split(h @ weight(name, n, n), 2, 1)
                h = a * jax.nn.sigmoid(b)
            elif kind == 8 and n % 2 == 0:
                h = h.reshape(len(h), n // 2, 2) * weight(name, n // 2, 1)[None]
                h = jnp.swapaxes(h, 1, 2).reshape(len(h), n)
            elif kind == 9:
                h = h / jnp.sqrt(jnp.mean(h * h, 1, keepdims=True) + 1)
            elif kind == 10:
                h = jax.nn.softmax(h, 1) * h
            elif kind == 11:
                h = jnp.where(jnp.cumsum(h, 1) > 0, h, 0.5 * h)
            elif kind == 12:
                h = h[:, ::2] if n > 4 else h
            elif kind == 13:
                h = jnp.repeat(h, 2, 1) @ weight(name, 2 * n, width)
        return h @ weight("out", h.shape[1], 2)

    def make(name, shape):
        params[name] = jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), jnp.float32)

    x = normal(3, 4)
    run(None, x, make)
    return (lambda p, x: run(p, x)), params, x


def test_random_programs_obey_the_law():
    pruned = 0
    for seed in range(10):
        apply, params, x = random_program(seed)
        groups = jp.channel_groups(apply, params, x)
        exact = groups.where(lambda g: not g.frozen and g.exact)
        if not len(exact):
            continue
        rng = np.random.default_rng(seed)
        scores = jax.tree.map(
            lambda p, r=rng: jnp.asarray(r.uniform(size=p.shape), jnp.float32), params
        )
        masks = jp.mask_channels(scores, exact, 0.15)
        small_apply, small = jp.shrink(apply, params, masks, groups)
        expected = jax.jit(apply)(jp.apply_masks(params, masks), x)
        scale = float(jnp.abs(expected).max()) + 1e-6
        np.testing.assert_allclose(
            jax.jit(small_apply)(small, x), expected, rtol=1e-5, atol=1e-5 * scale
        )
        pruned += 1
    assert pruned > 5
