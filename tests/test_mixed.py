"""One budget for weights, slices, blocks and leaves, against a loop over all units."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import stepper
from hypothesis import given
from hypothesis import strategies as st

import jaxprune as jp

DTYPE_PROMOTION = "standard"  # optax promotes
SHAPES = {"fine": (4, 5), "columns": (6, 8), "blocks": (5, 7), "drop": (3, 4), "heads": (8, 4)}
UNITS = {
    "fine": jp.Weights(),
    "columns": jp.Groups(axes=0),
    "blocks": jp.Blocks((2, 3)),
    "drop": jp.Leaf(),
    "heads": jp.Groups(axes=1, size=4),
}
COSTS = {"fine": 1.0, "columns": 3.0, "blocks": 0.5, "drop": 2.0, "heads": 1.0}


def labels(name):
    """Which unit each weight belongs to."""
    rows, columns = SHAPES[name]
    i, j = np.indices((rows, columns))
    return {
        "fine": i * columns + j,
        "columns": j,
        "blocks": i // 2 * 3 + j // 3,
        "drop": 0 * i,
        "heads": i // 4,
    }[name]


def scores_of(seed):
    # Small integers: every mean and every quotient by the costs is exact, or correctly rounded.
    rng = np.random.default_rng(seed)
    return {name: rng.integers(0, 50, shape).astype(np.float32) for name, shape in SHAPES.items()}


def loop(scores, budget, costs):
    """The longest prefix of units by (score per cost, leaf, unit) whose cost fits the budget."""
    ranked = []
    for place, name in enumerate(sorted(SHAPES)):
        label = labels(name)
        for unit in range(label.max() + 1):
            values = scores[name][label == unit]
            mean = np.float32(values.sum()) / np.float32(values.size)
            per_cost = np.float32(mean) / np.float32(costs[name])
            ranked.append((-per_cost, place, unit, name, values.size * costs[name]))
    masks, spent = {name: np.zeros(SHAPES[name], bool) for name in SHAPES}, 0.0
    for _, _, unit, name, cost in sorted(ranked):
        if spent + cost > budget:
            break
        spent += cost
        masks[name] |= labels(name) == unit
    return masks


@given(
    st.integers(0, 10**6), st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.75, 0.875, 1.0]), st.booleans()
)
def test_mixed_by_loop(seed, sparsity, priced):
    scores, costs = scores_of(seed), COSTS if priced else dict.fromkeys(COSTS, 1.0)
    whole = sum(costs[name] * leaf.size for name, leaf in scores.items())
    unit = 0.5 if priced else 1.0  # budgets are whole multiples of the smallest cost
    budget = whole - np.floor(whole / unit * sparsity + 0.5) * unit
    want = loop(scores, budget, costs)
    found = jp.mask_mixed(scores, sparsity, UNITS, min_keep=0, costs=COSTS if priced else None)
    jax.tree.map(np.testing.assert_array_equal, found, want)


def test_counts_are_added_up_to_the_budget():
    scores = scores_of(0)
    mask = partial(jp.mask_mixed, units=UNITS, min_keep=0)
    keep = jp.allocate_uniform(scores, 0.5)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(mask)(scores, keep), mask(scores, 0.5))


def test_jitted_with_a_traced_sparsity():
    scores = scores_of(1)
    mask = jax.jit(lambda s, sparsity: jp.mask_mixed(s, sparsity, UNITS))
    for sparsity in (0.2, 0.6, 0.95):
        found = mask(scores, jnp.float32(sparsity))
        jax.tree.map(np.testing.assert_array_equal, found, jp.mask_mixed(scores, sparsity, UNITS))
    assert mask._cache_size() == 1


def test_masks_are_nested_as_sparsity_rises():
    scores, last = scores_of(2), None
    for sparsity in np.linspace(1, 0, 9):
        masks = jp.mask_mixed(scores, float(sparsity), UNITS)
        if last is not None:
            jax.tree.map(lambda a, b: np.testing.assert_array_equal(a & b, a), last, masks)
        last = masks


def test_every_leaf_keeps_a_unit_but_a_leaf_may_go():
    masks = jp.mask_mixed(scores_of(3), 1.0, UNITS)
    kept = {name: int(mask.sum()) for name, mask in masks.items()}
    assert kept["drop"] == 0
    assert kept["fine"] == 1
    assert kept["columns"] == 6
    assert kept["heads"] == 16
    assert 1 <= kept["blocks"] <= 6


def test_under_a_transform():
    params = {
        name: {"kernel": jnp.asarray(np.random.default_rng(i).normal(size=(8, 8)), jnp.float32)}
        for i, name in enumerate(("fine", "blocks", "drop"))
    }
    units = {"fine": jp.Weights(), "blocks": jp.Blocks(4), "drop": jp.Leaf()}
    tx = jp.prune_gradually(
        optax.adamw(0.01),
        jp.cubic_sparsity(0.5, 4),
        when=jp.every(2, end=4),
        mask=partial(jp.mask_mixed, units=units),
    )
    step, state = stepper(tx), tx.init(params)
    for t in range(6):
        params, state = step(params, state, jnp.float32(t))
    masks = jp.get_masks(state, params)
    total = sum(int(leaf.sum()) for leaf in jax.tree.leaves(masks))
    assert 96 - 64 < total <= 96
    blocks = np.asarray(masks["blocks"]["kernel"]).reshape(2, 4, 2, 4)
    assert (blocks.all((1, 3)) == blocks.any((1, 3))).all()
    assert int(masks["drop"]["kernel"].sum()) in (0, 64)


def test_bad_input():
    scores = {"a": jnp.ones((4, 6)), "b": jnp.ones((4, 6))}
    weights = jp.Weights()
    bad = {
        "no unit for b": lambda: jp.mask_mixed(scores, 0.5, {"a": weights}),
        "'c' matches none of": lambda: jp.mask_mixed(scores, 0.5, {"c": weights}, default=weights),
        "'a' can never apply": lambda: jp.mask_mixed(scores, 0.5, {"": weights, "a": weights}),
        "b: a block of": lambda: jp.mask_mixed(scores, 0.5, {"a": weights, "b": jp.Blocks(5)}),
        "b: shape": lambda: jp.mask_mixed(scores, 0.5, {"a": weights, "b": jp.Groups(0, 4)}),
        "b: axes": lambda: jp.mask_mixed(scores, 0.5, {"a": weights, "b": jp.Groups(5)}),
        "sparsity is 2": lambda: jp.mask_mixed(scores, 2.0, {"": weights}),
        "min_keep is -1": lambda: jp.mask_mixed(scores, 0.5, {"": weights}, min_keep=-1),
        "a: the cost": lambda: jp.mask_mixed(
            scores, 0.5, {"": weights}, costs={"a": 0.0, "b": 1.0}
        ),
        "different trees": lambda: jp.mask_mixed(scores, {"a": 3}, {"": weights}),
    }
    for message, call in bad.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="rule 'a': 4 is no unit"):
        jp.mask_mixed(scores, 0.5, {"a": 4}, default=weights)
    with pytest.raises(TypeError, match="default: 4 is no unit"):
        jp.mask_mixed(scores, 0.5, {"a": weights}, default=4)


def test_floors_hold_where_units_are_ragged():
    scores = {"a": jnp.ones((7, 9)).at[6, 8].set(9.0), "b": jnp.full((9, 9), 5.0)}
    units = {"a": jp.Blocks((2, 4))}
    masks = jp.mask_mixed(scores, 1.0, units, default=jp.Weights(), min_keep=5)
    assert int(masks["a"].sum()) >= 5
