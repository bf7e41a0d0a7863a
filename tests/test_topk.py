"""Exact selection against a stable NumPy sort."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxprune import _counting, _exact, _topk
from jaxprune._leaves import Leaves, any_nan

DTYPES = [jnp.float16, jnp.bfloat16, jnp.float32]
KINDS = ["normal", "ties", "special", "constant", "subnormal", "wide"]
SHAPES = ((7, 9), (64, 32), (3, 3, 8, 4), (50,))


def scores(shape, dtype, kind, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape)
    if kind == "ties":
        x = np.round(x * 2)
    if kind == "special":
        odd = [np.nan, np.inf, -np.inf, 0.0, -0.0]
        x.reshape(-1)[rng.integers(0, x.size, x.size // 2)] = rng.choice(odd, x.size // 2)
    if kind == "constant":
        x = np.full(shape, -0.5)
    if kind == "subnormal":
        x = x * 1e-40
    if kind == "wide":
        x = x * 10.0 ** rng.uniform(-44, 37, shape)
    return jnp.asarray(x.astype(np.float32)).astype(dtype)


def oracle(leaf, keep):
    """The ``keep`` largest: zeros equal, NaN last, ties by index."""
    x = np.asarray(leaf.astype(jnp.float64 if leaf.dtype == jnp.float64 else jnp.float32)).ravel()
    best = np.lexsort((np.arange(x.size), -np.where(np.isnan(x), 0, x), np.isnan(x)))[:keep]
    mask = np.zeros(x.size, bool)
    mask[best] = True
    return mask.reshape(leaf.shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_top_of_each_leaf(dtype, kind):
    leaves = [scores(shape, dtype, kind, i) for i, shape in enumerate(SHAPES)]
    rng = np.random.default_rng(0)
    for case in range(4):
        keep = [[0, leaf.size, 1, int(rng.integers(0, leaf.size))][case] for leaf in leaves]
        for leaf, k, mask in zip(leaves, keep, _topk.top(leaves, keep).masks, strict=True):
            np.testing.assert_array_equal(mask, oracle(leaf, k))


def test_leaves_of_different_types_are_searched_together():
    leaves = [scores(s, d, "ties", 3) for s, d in zip(SHAPES, [*DTYPES, jnp.float32], strict=True)]
    masks = _topk.top(leaves, [5, 100, 9, 50]).masks
    for leaf, mask in zip(leaves, masks, strict=True):
        np.testing.assert_array_equal(mask, oracle(leaf, int(mask.sum())))
    assert [int(mask.sum()) for mask in masks] == [5, 100, 9, 50]


@given(st.data())
def test_top_of_any_shape(data):
    shape = data.draw(st.sampled_from([(1,), (13,), (5, 1), (4, 6), (2, 3, 5), (256, 3)]))
    kind = data.draw(st.sampled_from(KINDS))
    leaf = scores(shape, data.draw(st.sampled_from(DTYPES)), kind, data.draw(st.integers(0, 999)))
    keep = data.draw(st.integers(0, leaf.size))
    np.testing.assert_array_equal(_topk.top([leaf], [keep]).masks[0], oracle(leaf, keep))


@pytest.mark.parametrize("kind", KINDS)
def test_top_of_doubles(kind):
    with jax.enable_x64(True):
        for seed in range(3):
            leaf = jnp.asarray(np.asarray(scores((40, 5), jnp.float32, kind, seed), np.float64))
            leaf = jnp.where(leaf > 0, leaf * np.float64(1 + 2.0**-40), leaf)
            for keep in (0, 1, 77, 200):
                np.testing.assert_array_equal(
                    _topk.top([leaf], [keep]).masks[0], oracle(leaf, keep)
                )


@pytest.mark.parametrize("floors", [(0, 0, 0, 0), (3, 1, 2, 20)])
@pytest.mark.parametrize("kind", ["normal", "ties", "constant", "wide"])
def test_top_of_all_leaves_together(kind, floors):
    dtypes = (jnp.float32, jnp.float32, jnp.float16, jnp.bfloat16)
    leaves = [scores(s, d, kind, 5) for s, d in zip(SHAPES, dtypes, strict=True)]
    first = [oracle(leaf, floor) for leaf, floor in zip(leaves, floors, strict=True)]
    must = np.concatenate([mask.ravel() for mask in first])
    flat = np.concatenate([np.asarray(leaf.astype(jnp.float32)).ravel() for leaf in leaves])
    ranked = np.lexsort((np.arange(flat.size), -flat, ~must))
    search = partial(_topk.top_shared, leaves, costs=(1,) * 4, floors=floors)
    for budget in (26, 100, 1000, ranked.size - 1, ranked.size):
        want = np.zeros(ranked.size, bool)
        want[ranked[:budget]] = True
        masks, counts, _ = search(_exact.constant(budget))
        np.testing.assert_array_equal(np.concatenate([m.ravel() for m in masks]), want)
        assert [int(m.sum()) for m in masks] == [int(k) for k in counts]
        alone = search(_exact.constant(budget), counts_only=True).counts
        assert [int(k) for k in alone] == [int(k) for k in counts]


@given(st.integers(0, 999), st.sampled_from([(1,) * 6, (3, 1, 2, 5, 1, 1)]))
def test_stacked_leaves_are_as_leaves_alone(seed, costs):
    shapes, kinds = [(4, 5), (3, 7)] * 2 + [(4, 5)] * 2, ("a", "b", "a", "b", "c", "a")
    leaves = [scores(s, jnp.float32, "ties", seed + i) for i, s in enumerate(shapes)]
    rng = np.random.default_rng(seed)
    keep = [int(rng.integers(0, leaf.size + 1)) for leaf in leaves]
    alone, together = _topk.top(leaves, keep), _topk.top(leaves, keep, kinds=kinds)
    jax.tree.map(np.testing.assert_array_equal, together, alone)
    floors = (1, 0, 2, 0, 3, 1)
    least = sum(cost * floor for cost, floor in zip(costs, floors, strict=True))
    budget = _exact.constant(int(rng.integers(least, 250)))
    search = partial(_topk.top_shared, leaves, budget, costs=costs, floors=floors)
    jax.tree.map(np.testing.assert_array_equal, search(kinds=kinds), search())


@pytest.mark.parametrize("kind", ["normal", "ties", "special", "subnormal"])
def test_what_is_kept_was_alive(kind):
    """Whatever is asked for; and where a living score is NaN nothing is pruned."""
    shapes, kinds = [(4, 5), (3, 7), (4, 5)], ("a", "b", "a")
    leaves = [jnp.nan_to_num(scores(s, jnp.float32, kind, i)) for i, s in enumerate(shapes)]
    leaves[0] = leaves[0].at[0].set(-jnp.inf)
    rng = np.random.default_rng(0)
    alive = [jnp.asarray(rng.random(shape) < 0.6) for shape in shapes]
    pairs = list(zip(leaves, alive, strict=True))
    least = jnp.finfo(jnp.float32).min
    lowest = [jnp.where(m, jnp.where(jnp.isinf(x) & (x < 0), least, x), -jnp.inf) for x, m in pairs]
    leaves = [jnp.where(m, x, jnp.nan) for x, m in pairs]  # what the dead score is not looked at
    for keep in ([0, 3, 9], [12, 21, 20]):
        found = _topk.top(leaves, keep, kinds=kinds, alive=alive)
        want = [oracle(x, k) & m for x, k, m in zip(lowest, keep, alive, strict=True)]
        jax.tree.map(np.testing.assert_array_equal, found.masks, want)
        assert not found.bad
    shared = partial(_topk.top_shared, costs=(1,) * 3, floors=(1,) * 3)
    budget = _exact.constant(17)
    found = shared(leaves, budget, kinds=kinds, alive=alive)
    jax.tree.map(np.testing.assert_array_equal, found.masks, shared(lowest, budget).masks)
    leaves[1] = jnp.where(alive[1], jnp.nan, leaves[1])
    for found in (
        _topk.top(leaves, [1, 1, 1], kinds=kinds, alive=alive),
        shared(leaves, budget, kinds=kinds, alive=alive),
    ):
        jax.tree.map(np.testing.assert_array_equal, found.masks, alive)
        assert found.bad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(32, 32), (64, 64), (12000,), (700, 401), (512, 1024)])
def test_one_nan_is_seen(shape, dtype):
    """XLA on CPU may take a maximum and lose it."""
    leaf = scores(shape, dtype, "normal", 0)
    alive = jnp.ones(shape, bool).at[(0,) * len(shape)].set(False)
    bad = jax.jit(lambda leaf: (any_nan([leaf]), _topk.top([leaf], [9], alive=[alive]).bad))
    assert not any(bad(leaf))
    assert all(bad(leaf.at[(7,) * len(shape)].set(jnp.nan)))
    seen, living = bad(leaf.at[(0,) * len(shape)].set(jnp.nan))
    assert seen
    assert not living


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 1), (2, 0), (0, 1, 2)])
def test_top_of_every_slice(axes):
    leaf = scores((5, 32, 8), jnp.float32, "ties", 1)
    one = [1 if a in axes else n for a, n in enumerate(leaf.shape)]
    length = int(np.prod([leaf.shape[a] for a in axes]))
    keep = np.random.default_rng(2).integers(0, length + 1, one)
    found = np.asarray(_topk.top_slices(leaf, jnp.asarray(keep, jnp.int32), axes=axes))
    order = [a for a in range(3) if a not in axes] + list(axes)
    slices, masks, counts = (
        np.transpose(np.asarray(x), order).reshape(-1, n)
        for x, n in ((leaf, length), (found, length), (keep, 1))
    )
    for row, mask, k in zip(slices, masks, counts[:, 0], strict=True):
        np.testing.assert_array_equal(mask, oracle(jnp.asarray(row), int(k)))


@given(st.integers(0, 999), st.integers(0, 60))
def test_units_of_several_weights_never_exceed(seed, keep):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 5, (3, 5)).astype(np.uint32)
    leaf = scores((3, 5), jnp.float32, "ties", seed)
    ranked = np.argsort(-np.asarray(leaf).ravel(), kind="stable")
    fits = ranked[np.cumsum(sizes.ravel()[ranked]) <= keep]
    want = np.zeros(15, bool)
    want[fits] = True
    np.testing.assert_array_equal(
        _topk.top_units(leaf, jnp.asarray(sizes), jnp.int32(keep)), want.reshape(3, 5)
    )


@pytest.mark.parametrize("more", [0, 1, 7, 1000, 2**31 - 100])
@pytest.mark.parametrize("kind", ["normal", "ties", "special", "constant"])
def test_all_that_there_is_where_more_is_wanted(kind, more):
    """In few passes: a guess that is off moves by more than a key."""
    leaf = scores((3, 5), jnp.float32, kind, 0)
    sizes = jnp.asarray(np.random.default_rng(0).integers(1, 5, (3, 5)).astype(np.uint32))

    @jax.jit
    def search(sizes, keep):
        return _topk._search(Leaves((leaf,), sizes), keep[None, None].astype(jnp.uint32)).step

    assert _topk.top_units(leaf, sizes, sizes.sum() + more).all()
    for units in (None, (sizes,)):
        everything = leaf.size if units is None else sizes.sum()
        assert search(units, jnp.asarray(everything + more)) < 40


@pytest.mark.parametrize(
    "shape", [(128, 6), (300,), (4096,), (3, 3, 64, 8), (1024, 3), (2048, 7, 2), (2, 1032, 5)]
)
def test_every_way_of_counting_counts(shape):
    """The variants that a CPU and an accelerator take, all run here."""
    leaf = jnp.asarray(np.random.default_rng(0).random(shape), jnp.float32)
    for axes in [tuple(range(len(shape))), (0,), (len(shape) - 1,)]:
        want = [np.sum(np.asarray(leaf) > share, axes, keepdims=True) for share in (0.7, 0.2)]
        cuts = cuts_above((0.7, 0.2), want[0].shape)
        for sums in every_count(leaf, cuts, axes):
            np.testing.assert_array_equal(_counting.counts(sums), want)


def cuts_above(thresholds, shape):
    keys = _counting.order(jnp.asarray(thresholds, jnp.float32), jnp.uint32)
    keys = jnp.broadcast_to(keys.reshape(2, *[1] * len(shape)), (2, *shape))
    return _counting.Cut(keys, jnp.zeros_like(keys))


def every_count(leaf, cuts, axes):
    """As an accelerator counts, as a CPU does, and as one does what takes longer."""

    @jax.jit
    def sums(leaf, cuts, step):
        counts = [_counting.count(cpu, leaf, cuts, step, axes, 0) for cpu in (False, True)]
        return *counts, _counting.count_bytes(*_counting.views(leaf, cuts, step, axes, 0), axes)

    return sums(leaf, cuts, jnp.int32(0))


@pytest.mark.parametrize(
    ("shape", "axes", "split"),
    [
        ((2048, 2049), (0, 1), (0, 128, 2)),
        ((2048, 2049), (1,), None),
        ((2048 * 2049,), (0,), None),
        ((1 << 22,), (0,), (0, 64, 8192)),
        ((4, 1 << 20), (1,), (1, 64, 2048)),
        ((3, 2048, 256), (0, 1), (1, 64, 4)),
    ],
)
def test_strips_of_large_leaves(shape, axes, split):
    assert _counting.strips(jnp.zeros(shape), axes) == split
    counted_as_numpy_does(shape, axes)


def counted_as_numpy_does(shape, axes):
    """Ends among equal scores too, which are all: every strip knows its place."""
    leaf = jnp.asarray(np.random.default_rng(0).integers(0, 3, shape), jnp.float32)
    slices = [1 if a in axes else n for a, n in enumerate(shape)]
    apart = cuts_above((1, 0), slices)
    ends = np.random.default_rng(1).integers(0, leaf.size // math.prod(slices), apart.end.shape)
    index = np.asarray(_counting.indices(shape, axes, jnp.int32(0)))
    for cuts in (apart, apart._replace(end=jnp.asarray(ends, jnp.uint32))):
        pairs = zip((1, 0), np.asarray(cuts.end), strict=True)
        kept = [(leaf > t) | ((leaf == t) & (index < end)) for t, end in pairs]
        want = [np.sum(x, axes, keepdims=True) for x in kept]
        sums = jax.jit(partial(_counting.count, True, axes=axes, grain=0))(leaf, cuts, jnp.int32(0))
        np.testing.assert_array_equal(_counting.counts(sums), want)


@pytest.mark.parametrize(("shape", "axes"), [((257, 2**17), (0, 1)), ((2**25,), (0,))])
def test_counts_past_what_a_float_counts(shape, axes):
    leaf = jnp.ones(shape)
    for sums in every_count(leaf, cuts_above((0.5, 0), (1,) * len(shape)), axes):
        assert _counting.counts(sums).ravel().tolist() == [leaf.size, leaf.size]


@pytest.mark.parametrize("kind", ["normal", "ties", "constant"])
def test_large_leaves_with_and_without_ties(kind):
    """Indices are compared only in passes among equal scores."""
    leaves = jnp.stack([scores((512, 1024), jnp.float32, kind, seed) for seed in range(2)])
    keep = leaves[0].size // 3
    top = jax.jit(lambda leaf: _topk.top([leaf], [keep]).masks[0])
    want = [oracle(leaf, keep) for leaf in leaves]
    for leaf, mask in zip(leaves, want, strict=True):
        np.testing.assert_array_equal(top(leaf), mask)
    np.testing.assert_array_equal(jax.vmap(top)(leaves), want)


@pytest.mark.parametrize(
    ("kind", "most"), [("normal", 9), ("wide", 24), ("ties", 12), ("constant", 14)]
)
def test_few_passes_find_the_cut(kind, most):
    """A search that crawls is right in the end, and useless."""
    leaf = jnp.abs(scores((64, 512), jnp.float32, kind, 1))
    for keep in (1, 300, leaf.size // 2, leaf.size - 1):
        problem = Leaves((leaf,))
        found = _topk._search(problem, jnp.array([[keep]], jnp.uint32))
        assert int(found.step) <= most
