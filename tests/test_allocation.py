"""Counts against exact rational arithmetic and the papers' rules."""

import itertools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp

SPARSITIES = st.one_of(
    st.floats(0, 1, width=32), st.sampled_from([0.0, 1.0, 0.5, 0.9, 0.99, 1e-7, 0.9999999])
)
SHAPES = st.lists(
    st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple), min_size=1, max_size=5
)


def budget(sparsity, n):
    return n - math.floor(Fraction(float(np.float32(sparsity))) * n + Fraction(1, 2))


def tree(shapes):
    return {f"leaf{i}": jnp.ones(shape) for i, shape in enumerate(shapes)}


def counts(keep):
    return [int(k) for k in jax.tree.leaves(keep)]


def seats(total, weights, caps, floors):
    """Webster's seats, in the order of their prices; floors are filled first, caps never passed."""
    prices = sorted(
        (Fraction(2 * k + 1, 2 * w), i, k)
        for i, (w, cap) in enumerate(zip(weights, caps, strict=True))
        for k in range(cap)
    )
    kept = list(floors)
    for _, i, k in prices:
        if sum(kept) >= max(total, sum(floors)):
            break
        kept[i] = max(kept[i], k + 1)
    return kept


@pytest.mark.parametrize("rule", ["uniform", "erk"])
@settings(max_examples=12)  # every shape compiles
@given(shapes=SHAPES, sparsity=SPARSITIES, min_keep=st.integers(0, 3))
def test_totals_are_split_by_webster(rule, shapes, sparsity, min_keep):
    caps = [math.prod(shape) for shape in shapes]
    floors = [min(min_keep, cap) for cap in caps]
    weights = caps if rule == "uniform" else [sum(shape) for shape in shapes]
    allocate = jp.allocate_uniform if rule == "uniform" else jp.allocate_erk
    want = seats(budget(sparsity, sum(caps)), weights, caps, floors)
    assert counts(allocate(tree(shapes), sparsity, min_keep=min_keep)) == want


def test_erk_makes_dense_what_would_pass_density_one():
    """The rule of RigL, resolved leaf by leaf in float64, agrees to within a rounding."""
    shapes = [(3, 3, 3, 64), (3, 3, 64, 128), (3, 3, 128, 256), (256, 10), (2048, 1000)]
    sizes = np.array([math.prod(s) for s in shapes], float)
    for sparsity in (0.5, 0.9, 0.98):
        dense: set[int] = set()
        while True:
            raw = np.array([sum(s) / math.prod(s) for s in shapes])
            free = [i for i in range(len(shapes)) if i not in dense]
            left = (1 - sparsity) * sizes.sum() - sum(sizes[i] for i in dense)
            scale = left / (raw * sizes)[free].sum()
            worst = max(free, key=lambda i: raw[i])
            if scale * raw[worst] <= 1:
                break
            dense.add(worst)
        want = [sizes[i] if i in dense else scale * raw[i] * sizes[i] for i in range(len(shapes))]
        found = counts(jp.allocate_erk(tree(shapes), sparsity))
        assert sum(found) == budget(sparsity, int(sizes.sum()))
        assert dense
        np.testing.assert_allclose(found, want, atol=1.0)


@settings(max_examples=12)  # every shape compiles
@given(shapes=SHAPES, sparsity=SPARSITIES, min_keep=st.integers(0, 3), seed=st.integers(0, 99))
def test_global_takes_the_best_of_all(shapes, sparsity, min_keep, seed):
    rng = np.random.default_rng(seed)
    leaves = [np.round(rng.normal(size=shape), 1).astype(np.float32) for shape in shapes]
    scores = {f"leaf{i}": jnp.asarray(leaf) for i, leaf in enumerate(leaves)}
    first = []
    for leaf in leaves:
        rank = np.argsort(np.argsort(-leaf.ravel(), kind="stable"), kind="stable")
        first.append(rank < min_keep)
    flat = np.concatenate([leaf.ravel() for leaf in leaves])
    order = np.lexsort((np.arange(flat.size), -flat, ~np.concatenate(first)))
    kept = max(budget(sparsity, flat.size), int(np.concatenate(first).sum()))
    chosen = np.zeros(flat.size, bool)
    chosen[order[:kept]] = True
    want = [int(p.sum()) for p in np.split(chosen, np.cumsum([x.size for x in leaves])[:-1])]
    assert counts(jp.allocate_global(scores, sparsity, min_keep=min_keep)) == want


def test_global_by_cost_keeps_the_longest_prefix_it_can_pay_for():
    rng = np.random.default_rng(0)
    leaves = [rng.uniform(size=n).astype(np.float32) for n in (20, 30, 7)]
    costs = [1.0, 2.5, 10.0]
    scores = {str(i): jnp.asarray(leaf) for i, leaf in enumerate(leaves)}
    for sparsity in (0.1, 0.5, 0.83, 1.0):
        total = sum(c * leaf.size for c, leaf in zip(costs, leaves, strict=True))
        money = total - math.floor(float(np.float32(sparsity)) * 2 * total + 0.5) / 2
        ranked = sorted(
            (-(leaf[j] / np.float32(c)), i, j)
            for i, (c, leaf) in enumerate(zip(costs, leaves, strict=True))
            for j in range(leaf.size)
        )
        want = [0, 0, 0]
        for _, i, _ in ranked:
            if money < costs[i]:
                break
            money -= costs[i]
            want[i] += 1
        tree_of_costs = {str(i): c for i, c in enumerate(costs)}
        found = jp.allocate_global(scores, sparsity, min_keep=0, costs=tree_of_costs)
        assert counts(found) == want


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9, 0.97])
def test_lamp_ranks_by_the_share_of_what_is_left(sparsity):
    rng = np.random.default_rng(1)
    leaves = [rng.normal(size=s) * k for s, k in (((40, 30), 1.0), ((25, 8), 5.0), ((300,), 0.1))]
    lamp = []
    for leaf in leaves:
        energy = np.sort(np.square(np.abs(leaf).astype(np.float32).astype(float)).ravel())
        lamp.append(energy / np.cumsum(energy[::-1])[::-1])
    cut = np.sort(np.concatenate(lamp))[::-1][budget(sparsity, sum(x.size for x in leaves)) - 1]
    want = [int((scores >= cut).sum()) for scores in lamp]
    scores = {str(i): jnp.abs(jnp.asarray(leaf, jnp.float32)) for i, leaf in enumerate(leaves)}
    assert counts(jp.allocate_lamp(scores, sparsity)) == want


@pytest.mark.parametrize("allocate", [jp.allocate_uniform, jp.allocate_erk])
def test_totals_pass_two_to_the_31(allocate):
    """Only shapes matter here, so leaves that no memory holds can be asked about."""
    leaf = jax.ShapeDtypeStruct((2**15, 2**15), jnp.float32)
    scores = {str(i): leaf for i in range(7)} | {"small": jax.ShapeDtypeStruct((3,), jnp.float32)}
    n = 7 * 2**30 + 3
    for sparsity in (0.0, 0.1, 0.9, 0.999999, 1.0):
        found = counts(allocate(scores, sparsity, min_keep=0))
        assert sum(found) == budget(sparsity, n)


@pytest.mark.parametrize(
    "allocate", [jp.allocate_uniform, jp.allocate_erk, jp.allocate_global, jp.allocate_lamp]
)
def test_sparsity_may_be_traced_and_is_then_clamped(allocate):
    scores = {"a": jnp.arange(1.0, 21.0), "skip": None, "b": jnp.arange(10.0)}
    traced = jax.jit(lambda s: allocate(scores, s))
    for sparsity in (0.0, 0.3, 0.77, 1.0):
        assert counts(traced(sparsity)) == counts(allocate(scores, sparsity))
    assert counts(traced(1.5)) == counts(allocate(scores, 1.0)) == [1, 1]
    assert counts(traced(-1.0)) == [20, 10]
    assert allocate(scores, 0.5)["skip"] is None


def test_costs_divide_alike_under_jit_and_as_numpy_does():
    scores = {
        "a": jnp.arange(1, 11, dtype=jnp.float32) * 0.1,
        "b": jnp.arange(1, 31, dtype=jnp.float32) * np.float32(0.3),
    }

    def by_cost(scores, sparsity):
        return jp.allocate_global(scores, sparsity, costs={"a": 1, "b": 3}, min_keep=0)

    for sparsity in (0.02, 0.06, 0.14, 0.3):
        assert counts(jax.jit(by_cost)(scores, sparsity)) == counts(by_cost(scores, sparsity))


LAMP_SCORES = {
    "normal": lambda rng, n: rng.normal(size=n),
    "heavy": lambda rng, n: np.exp(4 * rng.normal(size=n)),
    "grid": lambda rng, n: rng.integers(-1, 4, size=n) / 2,
    "equal": lambda rng, n: np.full(n, 0.3),
    "zero": lambda rng, n: np.zeros(n),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lamp_drops_no_larger_share_than_it_keeps(dtype):
    """Whatever the scores: the total is exact, and the shares in float64 are in order."""
    rng = np.random.default_rng(0)
    sizes = (700, 64, 500, 300)
    allocate = jax.jit(lambda scores, sparsity: jp.allocate_lamp(scores, sparsity, min_keep=2))
    for kinds in itertools.product(LAMP_SCORES, repeat=2):
        drawn = zip(sizes, kinds * 2, (1.0, 1e6, 1e-6, 3.0), strict=True)
        leaves = [jnp.asarray(LAMP_SCORES[kind](rng, n) * scale, dtype) for n, kind, scale in drawn]
        for sparsity in (0.0, 0.3, 0.77, 0.98, 1.0):
            found = counts(allocate({str(i): leaf for i, leaf in enumerate(leaves)}, sparsity))
            assert sum(found) == max(budget(sparsity, sum(sizes)), 8)
            kept, dropped = [], []
            for leaf, count in zip(leaves, found, strict=True):
                score = np.sort(np.maximum(np.asarray(leaf, float), 0))[::-1]
                energy = np.square(score)
                share = energy / np.maximum(np.cumsum(energy), 1e-300)
                kept.append(min(share[2:count], default=np.inf))
                dropped.append(max(share[count:], default=0))
            assert max(dropped) <= min(kept) * (1 + 1e-5), (kinds, sparsity, found)


def test_lamp_breaks_ties_by_leaf_and_wants_nan_last():
    same = jnp.array([2.0, 2.0, 0.0, 0.0])
    keep = jp.allocate_lamp({"a": same, "b": same, "c": same}, 5 / 12, min_keep=0)
    assert counts(keep) == [3, 2, 2]
    inf, none = jnp.inf, jnp.nan
    for leaves, sparsity, want in (
        ([[inf, none], [none, inf]], 1 / 4, [2, 1]),
        ([[inf, inf, none, inf], [none, inf]], 1 / 6, [4, 1]),
        ([[none, none, 3e38, inf], [none, none]], 2 / 3, [2, 0]),
        ([[inf, none, -1.0], [-1.0, -1.0, none]], 1 / 2, [2, 1]),
        ([[inf, 3e38, 3e38], [inf, 3e38, none]], 1 / 2, [2, 1]),
    ):
        scores = {str(i): jnp.array(leaf) for i, leaf in enumerate(leaves)}
        assert counts(jp.allocate_lamp(scores, sparsity, min_keep=0)) == want
    nan = jnp.array([jnp.nan, 1.0, -1.0, jnp.nan])
    assert counts(jp.allocate_lamp({"a": nan, "b": same}, 2 / 8, min_keep=0)) == [2, 4]
    assert counts(jp.allocate_lamp({"a": nan, "b": same}, 1 / 8, min_keep=0)) == [3, 4]


def test_lamp_for_seeds_in_parallel():
    rng = np.random.default_rng(0)
    scores = {str(i): jnp.asarray(rng.random((5, 40, i + 3)), jnp.float32) for i in range(3)}
    found = jax.vmap(lambda s: jp.allocate_lamp(s, 0.7))(scores)
    for seed in range(5):
        one = jp.allocate_lamp(jax.tree.map(lambda s, i=seed: s[i], scores), 0.7)
        assert counts(jax.tree.map(lambda k, i=seed: k[i], found)) == counts(one)


def test_lamp_whatever_the_scale():
    rng = np.random.default_rng(0)
    scores = {
        "a": jnp.asarray(rng.random((50, 50)), jnp.float32),
        "b": jnp.asarray(rng.random((50, 50)) ** 4, jnp.float32),
    }
    want = counts(jp.allocate_lamp(scores, 0.9))
    for exponent in (-80, 80):
        moved = jax.tree.map(lambda s, e=exponent: s * np.float32(2.0**e), scores)
        assert counts(jp.allocate_lamp(moved, 0.9)) == want
    endless = {**scores, "a": scores["a"].at[0, 0].set(jnp.inf)}
    assert counts(jp.allocate_lamp(endless, 1 - 2 / 5000))[0] == 1
