"""N:M, groups and blocks against brute force and NumPy loops; under jit, transforms and meshes."""

from functools import cache, partial
from itertools import combinations, pairwise, product

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import KEY, stepper
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp

DTYPE_PROMOTION = "standard"  # optax promotes


def scores_of(shape, seed=0, ties=False):
    values = np.random.default_rng(seed).normal(size=shape)
    return (values.round() if ties else values).astype(np.float32)


def grouped(x, axis, m):
    axes = (axis,) if isinstance(axis, int) else axis
    axes = [a % x.ndim for a in axes]
    rest = [a for a in range(x.ndim) if a not in axes]
    return np.asarray(x).transpose(*rest, *axes).reshape(-1, m)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("n", "m", "axis"),
    [(2, 4, 0), (2, 4, -1), (1, 2, 1), (2, 3, 0), (0, 4, 2), (4, 4, 1), (4, 8, (0, 1)), (1, 6, -2)],
)
def test_n_m_is_the_best_of_all_subsets(n, m, axis, ties):
    leaf = scores_of((12, 24, 12), ties=ties)
    mask = jax.jit(lambda s: jp.mask_n_m(s, n, m, axis=axis))({"w": leaf})["w"]
    subsets = list(combinations(range(m), n))
    for row, score in zip(grouped(mask, axis, m), grouped(leaf, axis, m), strict=True):
        # Of equally good subsets the first in lexicographic order: ties go to the earlier.
        best = max(subsets, key=lambda s: sorted((float(score[i]), -i) for i in s)[::-1])
        assert np.flatnonzero(row).tolist() == list(best)


@pytest.mark.parametrize("axis", [0, -1, (1, 0)])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_n_m_of_what_is_not_finite(dtype, axis):
    rng = np.random.default_rng(1)
    odd = rng.choice([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, 1e-41, 1e-40], (16, 16))
    leaf = jnp.asarray(odd, dtype)
    mask = jp.mask_n_m({"w": leaf}, 2, 4, axis=axis)["w"]
    wide = np.asarray(leaf.astype(jnp.float32)).astype(np.float64)
    for row, score in zip(grouped(mask, axis, 4), grouped(wide, axis, 4), strict=True):
        keys = np.where(np.isnan(score), np.inf, -score), np.isnan(score)
        want = np.lexsort((np.arange(4), keys[0], keys[1]))[:2]
        assert set(np.flatnonzero(row)) == set(want), (score, row)


@pytest.mark.parametrize(
    ("n", "m", "axis"), [(2, 4, 0), (1, 3, -1), (0, 2, 1), (3, 3, 0), (1, 1, -2)]
)
def test_gradual_n_m_keeps_its_budget_and_the_survivors(n, m, axis):
    leaf = {"w": scores_of((2 * m, 3 * m), m, ties=True)}
    full = np.asarray(jp.mask_n_m(leaf, n, m, axis=axis)["w"])
    masking = jax.jit(jp.gradual_n_m(n, m, axis=axis))
    last, some = np.zeros(leaf["w"].shape, bool), full.sum()
    for keep in sorted({0, 1, some - 1, some, some + 1, full.size - 1, full.size}):
        if not 0 <= keep <= full.size:
            continue
        mask = np.asarray(masking(leaf, {"w": np.int32(keep)})["w"])
        assert mask.sum() == keep
        assert (last <= mask).all()
        assert (mask <= full).all() if keep <= some else (full <= mask).all()
        inside = full if keep <= some else ~full
        chosen, left = leaf["w"][inside & mask], leaf["w"][inside & ~mask]
        assert not chosen.size or not left.size or chosen.min() >= left.max()
        last = mask


def test_gradual_n_m_counts_what_is_not_finite():
    leaf = {"w": np.float32([np.nan, -np.inf, np.nan, 1.0, np.inf, np.inf, np.inf, np.nan])}
    for keep in range(9):
        assert int(jp.gradual_n_m(2, 4, axis=0)(leaf, {"w": keep})["w"].sum()) == keep


def valid_patterns(n, m):
    rows = [sum(1 << c for c in pick) for pick in combinations(range(m), n)]
    for pattern in product(rows, repeat=m):
        table = np.array([[r >> c & 1 for c in range(m)] for r in pattern], bool)
        if (table.sum(0) == n).all():
            yield table


def tiles(x, m):
    rows, columns = x.shape
    return np.asarray(x).reshape(rows // m, m, columns // m, m).swapaxes(1, 2).reshape(-1, m, m)


@pytest.mark.parametrize("ties", [False, True])
def test_transposable_two_of_four_is_the_best_of_ninety(ties):
    patterns = np.stack(list(valid_patterns(2, 4)))
    assert len(patterns) == 90
    leaf = np.abs(scores_of((16, 20), ties=ties))
    mask = jax.jit(lambda s: jp.mask_n_m_transposable(s, 2, 4))({"w": leaf})["w"]
    for chosen, score in zip(tiles(mask, 4), tiles(leaf, 4), strict=True):
        assert (chosen.sum(0) == 2).all()
        assert (chosen.sum(1) == 2).all()
        best = (patterns * score.astype(np.float64)).sum((1, 2)).max()
        np.testing.assert_allclose(score[chosen].astype(np.float64).sum(), best, rtol=1e-6)


@pytest.mark.parametrize(("n", "m"), [(1, 2), (1, 3), (2, 3), (1, 4), (3, 4), (0, 4), (4, 4)])
@pytest.mark.parametrize("ties", [False, True])
def test_transposable_is_at_least_half_of_the_best(n, m, ties):
    patterns = np.stack(list(valid_patterns(n, m)))
    leaf = np.abs(scores_of((8 * m, 8 * m), seed=m, ties=ties))
    mask = jax.jit(lambda s: jp.mask_n_m_transposable(s, n, m))({"w": leaf})["w"]
    for chosen, score in zip(tiles(mask, m), tiles(leaf, m), strict=True):
        assert (chosen.sum(0) == n).all()
        assert (chosen.sum(1) == n).all()
        assert 2 * score[chosen].sum() >= (patterns * score).sum((1, 2)).max() - 1e-5


@pytest.mark.parametrize(("n", "m"), [(2, 5), (4, 8), (3, 8), (5, 6)])
def test_transposable_is_complete_where_greed_is_stuck(n, m):
    leaf = np.abs(scores_of((20 * m, 20 * m), seed=n))
    mask = jp.mask_n_m_transposable({"w": leaf}, n, m)["w"]
    assert (tiles(mask, m).sum(1) == n).all()
    assert (tiles(mask, m).sum(2) == n).all()


def test_transposable_over_other_axes():
    leaf = np.abs(scores_of((8, 3, 12)))
    for n, m in ((2, 4), (1, 4)):
        mask = jp.mask_n_m_transposable({"w": leaf}, n, m, axes=(0, -1))["w"]
        for i in range(3):
            want = jp.mask_n_m_transposable({"w": leaf[:, i]}, n, m)["w"]
            np.testing.assert_array_equal(mask[:, i], want)


def best_prefix(units, keep):
    """Units as (score, weights): the longest ranked prefix that fits, by loop."""
    order = sorted(range(len(units)), key=lambda u: (-units[u][0], u))
    kept, spent = set(), 0
    for u in order:
        if spent + units[u][1] > keep:
            break
        kept.add(u)
        spent += units[u][1]
    return kept


@settings(max_examples=12)
@given(st.data())
def test_groups_by_loop(data):
    shape = data.draw(st.sampled_from([(6, 8), (3, 4, 6), (2, 3, 2, 4)]))
    dims = range(len(shape))
    axes = data.draw(st.lists(st.sampled_from(dims), unique=True, min_size=1))
    others = [a for a in dims if a not in axes]
    sizes = [s for s in (1, 2, 3) if others and shape[others[-1]] % s == 0] or [1]
    size = data.draw(st.sampled_from(sizes))
    keep = data.draw(st.integers(0, int(np.prod(shape))))
    leaf = np.round(scores_of(shape, data.draw(st.integers(0, 9))), 1)
    mask = np.asarray(jp.mask_groups({"w": leaf}, {"w": keep}, axes=tuple(axes), size=size)["w"])
    label = np.zeros(shape, int)
    for a in others:
        n, step = shape[a], size if a == others[-1] else 1
        along = (np.arange(n) // step).reshape([-1 if b == a else 1 for b in dims])
        label = label * (n // step) + along
    count = label.max() + 1
    # In float64 the sums of a few one-decimal numbers rank as they do exactly.
    units = [
        (leaf[label == u].astype(np.float64).sum().round(6), (label == u).sum())
        for u in range(count)
    ]
    exact = [(np.float32(s), w) for s, w in units]
    if len({s for s, _ in exact}) == count:
        np.testing.assert_array_equal(mask, np.isin(label, list(best_prefix(exact, keep))))
    assert mask.sum() == keep // units[0][1] * units[0][1]


@pytest.mark.parametrize("score", ["mean", "sum", "max"])
@settings(max_examples=8)
@given(data=st.data())
def test_blocks_by_loop(score, data):
    shape = data.draw(st.sampled_from([(5, 7), (4, 6), (2, 5, 3), (3, 2, 4, 5)]))
    axes = data.draw(st.sampled_from([(-2, -1), (0, -1), (-1, 0)]))
    block = tuple(data.draw(st.integers(1, shape[a])) for a in axes)
    keep = data.draw(st.integers(0, int(np.prod(shape))))
    leaf = np.random.default_rng(0).integers(0, 64, shape).astype(np.float32)
    mask = jp.mask_blocks({"w": leaf}, {"w": keep}, block=block, axes=axes, score=score)["w"]
    step = dict(zip([a % len(shape) for a in axes], block, strict=True))
    label = np.zeros(shape, int)
    for a, n in enumerate(shape):
        parts = -(-n // step.get(a, 1))
        along = (np.arange(n) // step.get(a, 1)).reshape(
            [-1 if b == a else 1 for b in range(leaf.ndim)]
        )
        label = label * parts + along
    how = {"mean": np.mean, "sum": np.sum, "max": np.max}[score]
    units = [
        (np.float32(how(leaf[label == u])), int((label == u).sum())) for u in range(label.max() + 1)
    ]
    np.testing.assert_array_equal(mask, np.isin(label, list(best_prefix(units, keep))))


@pytest.mark.parametrize("score", ["mean", "sum", "max"])
@pytest.mark.parametrize("size", [16, 64, 512])
def test_blocks_with_a_nan_go_first(size, score):
    leaf = np.random.default_rng(0).random((size, size), np.float32)
    leaf[-1, -1] = np.nan
    mask = jax.jit(partial(jp.mask_blocks, block=8, score=score))(
        {"w": jnp.asarray(leaf)}, {"w": size * size - 64}
    )
    assert not mask["w"][-8:, -8:].any()
    assert int(mask["w"].sum()) == size * size - 64


def test_heads_and_whole_leaves():
    heads = np.repeat(np.float32([3.0, 1.0, 2.0, 0.0]), 2)
    query = {"w": np.broadcast_to(heads, (5, 8)).copy()}
    out = {"w": query["w"].T.copy()}
    kept = np.repeat([True, False, True, False], 2)
    mask = jp.mask_groups(query, {"w": 20}, axes=0, size=2)["w"]
    np.testing.assert_array_equal(mask, np.broadcast_to(kept, (5, 8)))
    mask = jp.mask_groups(out, {"w": 20}, axes=1, size=2)["w"]
    np.testing.assert_array_equal(mask, np.broadcast_to(kept[:, None], (8, 5)))
    for keep in (39, 40):
        assert bool(jp.mask_groups(query, {"w": keep}, axes=(0, 1))["w"].all()) == (keep == 40)


SHAPE = (16, 24)
TRANSFORMS = {
    "gradual_n_m": lambda **kw: jp.prune_gradually(
        optax.adamw(0.01),
        jp.cubic_sparsity(0.5, 6),
        when=jp.every(2, end=6),
        mask=jp.gradual_n_m(2, 4, axis=0),
        **kw,
    ),
    "n_m_rigl": lambda: jp.rigl(
        optax.adamw(0.01),
        0.5,
        drop_fraction=0.3,
        when=jp.every(2),
        key=KEY,
        allocate=jp.allocate_uniform,
        mask=jp.gradual_n_m(2, 4, axis=0),
    ),
    "block_rigl": lambda: jp.rigl(
        optax.adamw(0.01),
        0.75,
        drop_fraction=0.3,
        when=jp.every(2),
        key=KEY,
        allocate=jp.allocate_uniform,
        mask=lambda s, k: jp.mask_blocks(s, k, block=4),
    ),
    "gradual_groups": lambda **kw: jp.prune_gradually(
        optax.adamw(0.01),
        jp.cubic_sparsity(0.5, 6),
        when=jp.every(2, end=6),
        mask=lambda s, k: jp.mask_groups(s, k, axes=0, size=2),
        **kw,
    ),
}


def train(tx, steps=9):
    params = {"kernel": jnp.asarray(scores_of(SHAPE))}
    step, state, path = stepper(tx), tx.init(params), []
    for t in range(steps):
        params, state = step(params, state, jnp.float32(t))
        path.append((params, np.asarray(jp.get_masks(state, params)["kernel"])))
    return path


def check_structure(name, mask):
    if name.endswith("n_m") or name.startswith("n_m"):
        assert (grouped(mask, 0, 4).sum(1) == 2).all()
    elif name == "block_rigl":
        blocks = mask.reshape(4, 4, 6, 4)
        assert (blocks.all((1, 3)) == blocks.any((1, 3))).all()
    else:
        heads = mask.reshape(16, 12, 2)
        assert (heads.all((0, 2)) == heads.any((0, 2))).all()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_under_transforms(name):
    path = train(TRANSFORMS[name]())
    wanted = SHAPE[0] * SHAPE[1] // (4 if name == "block_rigl" else 2)
    params, last = path[-1]
    check_structure(name, last)
    assert last.sum() == wanted
    assert not np.asarray(params["kernel"])[~last].any()
    if name.endswith("rigl"):
        assert all(mask.sum() == wanted for _, mask in path)
        assert (path[0][1] != last).any()
        for _, mask in path:
            check_structure(name, mask)
    else:
        for (_, before), (_, after) in pairwise(path):
            assert (after <= before).all()
        counts = [mask.sum() for _, mask in path]
        assert wanted < counts[3] < SHAPE[0] * SHAPE[1]
        packed = train(TRANSFORMS[name](packed=True))
        np.testing.assert_array_equal(packed[-1][1], last)


MAKERS = {
    "n_m_rows": lambda s: jp.mask_n_m(s, 2, 4, axis=0),
    "n_m_columns": lambda s: jp.mask_n_m(s, 1, 3, axis=-1),
    "n_m_both": lambda s: jp.mask_n_m(s, 2, 16, axis=(1, 0)),
    "gradual": lambda s: jp.gradual_n_m(2, 4, axis=1)(s, jp.allocate_uniform(s, 0.3)),
    "transposable": lambda s: jp.mask_n_m_transposable(s, 2, 4),
    "transposable_greedy": lambda s: jp.mask_n_m_transposable(s, 1, 4),
    "heads": lambda s: jp.mask_groups(s, jp.allocate_uniform(s, 0.6), axes=0, size=3),
    "blocks_ragged": lambda s: jp.mask_blocks(s, jp.allocate_uniform(s, 0.6), block=(5, 7)),
    "blocks_max": lambda s: jp.mask_blocks(s, jp.allocate_uniform(s, 0.6), block=8, score="max"),
    "mixed": lambda s: jp.mask_mixed(
        s,
        0.6,
        {"rows": jp.Groups(1, 2), "columns": jp.Blocks(8), "both": jp.Leaf()},
        default=jp.Weights(),
    ),
    "rules": lambda s: jp.mask_by_path({"both": jp.gradual_n_m(2, 4, axis=0)})(
        s, jp.allocate_by_path({"both": 0.5, "rows": None})(s, 0.75)
    ),
}


SPECS = {"rows": P("x", None), "columns": P(None, "y"), "both": P("x", "y"), "none": P()}


@cache
def on_one_device(maker):
    values = {name: scores_of((12, 24), seed) for seed, name in enumerate(SPECS)}
    return values, jax.jit(MAKERS[maker])(values)


@pytest.mark.usual("gradual", "heads", "n_m_columns", "n_m_rows", "ragged", "rules")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("maker", MAKERS)
def test_shard_boundaries_inside_units_change_nothing(maker, kind):
    """12 rows over 4 devices put boundaries inside groups of 4; 12 columns, inside blocks."""
    values, want = on_one_device(maker)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    with jax.sharding.set_mesh(mesh):
        placed = {k: jax.device_put(v, NamedSharding(mesh, SPECS[k])) for k, v in values.items()}
        found = jax.jit(MAKERS[maker])(placed)
    jax.tree.map(np.testing.assert_array_equal, found, want)
    if kind is AxisType.Explicit:
        for name, mask in found.items():
            assert mask.sharding.is_equivalent_to(placed[name].sharding, 2), name


def test_inside_shard_map_a_shard_that_cuts_a_group_is_refused():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    leaf = jnp.asarray(scores_of((24, 8)))

    def local(shard, m):
        return jp.mask_n_m({"w": shard}, 1, m, axis=0)["w"]

    spread = {
        m: jax.shard_map(lambda s, m=m: local(s, m), mesh=mesh, in_specs=P("x"), out_specs=P("x"))
        for m in (3, 4)
    }
    np.testing.assert_array_equal(jax.jit(spread[3])(leaf), local(leaf, 3))
    with pytest.raises(ValueError, match="w: 4 does not divide the 6 entries"):
        spread[4](leaf)


def test_bad_input_names_the_leaf_and_the_remedy():
    scores, keep = {"a": {"w": jnp.ones((6, 8))}}, {"a": {"w": 8}}
    bad = {
        "3:2 is no pattern": lambda: jp.mask_n_m(scores, 3, 2, axis=0),
        "-1:2 is no pattern": lambda: jp.gradual_n_m(-1, 2, axis=0),
        "1:0 is no pattern": lambda: jp.mask_n_m_transposable(scores, 1, 0),
        "a/w: 4 does not divide the 6": lambda: jp.gradual_n_m(2, 4, axis=0)(scores, keep),
        "a/w: 4 does not divide the 6 ": lambda: jp.mask_n_m_transposable(scores, 2, 4),
        "a/w: axes .* are not two": lambda: jp.mask_n_m_transposable(scores, 2, 2, axes=(0,)),
        "a/w: axes .* distinct": lambda: jp.mask_groups(scores, keep, axes=2),
        "a/w: shape .* no groups of 3": lambda: jp.mask_groups(scores, keep, axes=0, size=3),
        "a/w: shape .* no groups of 2": lambda: jp.mask_groups(scores, keep, axes=(0, 1), size=2),
        "size is 0": lambda: jp.mask_groups(scores, keep, axes=0, size=0),
        "a/w: a block of .* does not fit": lambda: jp.mask_blocks(scores, keep, block=7),
        "block is": lambda: jp.mask_blocks(scores, keep, block=(1, 2, 3)),
        "score is 'min'": lambda: jp.mask_blocks(scores, keep, block=2, score="min"),
        "a/w: cannot keep 99": lambda: jp.mask_groups(scores, {"a": {"w": 99}}, axes=0),
        "keep and scores have different trees": lambda: jp.mask_blocks(scores, {}, block=2),
    }
    for message, call in bad.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="a/w"):
        jp.mask_n_m({"a": {"w": jnp.ones((4, 4), jnp.int32)}}, 2, 4, axis=0)
