"""Reports say what was asked for and what was reached."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp

PARAMS = {
    "a": {"kernel": jnp.ones((10, 10)), "bias": jnp.ones(10)},
    "b": {"kernel": jnp.ones((5, 20))},
}


def trained(tx, params=PARAMS):
    _, state = tx.update(params, tx.init(params), params)
    return state


def updated(tx):
    updates, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    return optax.apply_updates(PARAMS, updates), state


def test_masked_weights_that_are_not_zero_are_reported():
    scaled = optax.chain(
        jp.prune_gradually(optax.sgd(0.0), 0.9, when=jp.every(1)), optax.scale(0.5)
    )
    report = jp.summarize(*updated(scaled))
    assert report.revived == 180
    assert str(report).splitlines()[-1].startswith("180 MASKED WEIGHTS ARE NOT ZERO")
    assert "<p>180 MASKED WEIGHTS ARE NOT ZERO" in report._repr_html_()
    assert (
        jp.summarize(*updated(jp.prune_gradually(optax.sgd(0.0), 0.9, when=jp.every(1)))).revived
        == 0
    )


def test_weights_that_are_nan_are_reported():
    params = jax.tree.map(lambda p: p.at[0].set(jnp.nan), PARAMS)
    report = jp.summarize(params)
    assert report.nans == report.as_dict()["nans"] == 30
    assert "30 WEIGHTS ARE NaN; they rank last" in str(report).splitlines()[-1]
    tx = jp.prune_gradually(optax.sgd(0.0), 0.5, when=jp.every(1))
    report = jp.summarize(params, tx.init(params))
    assert "30 WEIGHTS ARE NaN; masks stay as they are while scores are" in str(report)


def test_masks_that_no_update_has_applied_yet():
    tx = jp.rigl(
        optax.sgd(0.0), 0.9, key=jax.random.key(0), when=jp.every(9, begin=9), drop_fraction=0.3
    )
    report = jp.summarize(PARAMS, tx.init(PARAMS))
    assert (report.revived, report.step) == (180, 0)
    assert "180 masked weights are not zero yet: the first update zeroes them" in str(report)
    assert jp.summarize(*updated(tx)).revived == 0
    assert "180 MASKED WEIGHTS ARE NOT ZERO" in str(jp.summarize(PARAMS, updated(tx)[1]))


def test_a_schedule_that_stops_short_names_its_end():
    tx = jp.prune_gradually(optax.sgd(0.0), jp.cubic_sparsity(0.9, 8), when=lambda step: step == 4)
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(6):
        updates, state = tx.update(PARAMS, state, params)
        params = optax.apply_updates(params, updates)
    report = jp.summarize(params, state)
    assert report.requested == pytest.approx(0.7875)
    assert report.target == pytest.approx(0.9)
    assert "last asked for 78.7500%, the schedule ends at 90.0000%" in str(report)


def test_table_numbers_and_html():
    tx = jp.prune_gradually(optax.sgd(0.0), 0.9, when=jp.every(1))
    report = jp.summarize(*updated(tx))
    assert (report.kept, report.size, report.others) == (20, 200, 10)
    assert report.requested == pytest.approx(0.9)
    numbers = report.as_dict()
    assert numbers["sparsity/a/kernel"] == pytest.approx(0.9)
    assert {"sparsity", "kept", "size", "requested"} < set(numbers)
    lines = str(report).splitlines()
    assert lines[0].split() == ["leaf", "shape", "kept", "size", "sparsity"]
    assert lines[-1].endswith("asked for 90.0000%; 10 weights not governed")
    assert report._repr_html_().count("<tr>") == 4
    assert [row.path for row in report.leaves] == ["a/kernel", "b/kernel"]


def test_floors_and_ties_are_pointed_out():
    leaf = jnp.ones((4, 4))
    report = jp.summarize({"x": {"kernel": leaf}, "y": {"kernel": leaf}})
    assert "same array as x/kernel" in str(report)
    tx = jp.prune_gradually(optax.sgd(0.0), 1.0, when=jp.every(1))
    report = jp.summarize(*updated(tx))
    assert str(report).count("at its floor") == 2
    *_, total, warning = str(report).splitlines()
    assert total.endswith("asked for 100.0000%; 10 weights not governed")
    assert warning == (
        "99.0000% is not what was asked for: floors, rules, whole units, masks from the start or "
        "scores that were NaN"
    )
    assert report.kept == 2


def test_leaves_that_keep_nothing_are_pointed_out():
    report = jp.summarize({"kernel": jnp.ones((4, 4))}, {"kernel": jnp.zeros((4, 4), bool)})
    assert "100.0000%  NOTHING IS KEPT" in str(report)


def test_masks_of_nested_and_partitioned_states():
    first = jp.prune_gradually(
        optax.sgd(0.1), 0.5, when=jp.every(1), prunable=jp.matching("a/kernel")
    )
    second = jp.prune_gradually(
        optax.sgd(0.1, momentum=0.9),
        0.8,
        when=jp.every(1),
        prunable=jp.matching("b/kernel"),
        packed=True,
    )
    tx = optax.partition(
        {"a": first, "b": second},
        {"a": {"kernel": "a", "bias": "a"}, "b": {"kernel": "b"}},
    )
    masks = jp.get_masks(trained(optax.chain(optax.clip(1.0), tx)), PARAMS)
    assert int(masks["a"]["kernel"].sum()) == 50
    assert int(masks["b"]["kernel"].sum()) == 20
    assert masks["a"]["bias"] is None


def test_a_chain_keeps_what_both_keep():
    rng = np.random.default_rng(0)
    one, two = (
        {"a": {"kernel": jnp.asarray(rng.random((10, 10)) < 0.5), "bias": None}, "b": {"kernel": k}}
        for k in (None, jnp.ones((5, 20), bool))
    )
    tx = optax.chain(jp.keep_params_masked(one), jp.keep_params_masked(two))
    masks = jp.get_masks(tx.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(masks["a"]["kernel"], one["a"]["kernel"] & two["a"]["kernel"])
    assert int(masks["b"]["kernel"].sum()) == 100


def test_masks_by_name_in_our_own_state():
    tx = jp.prune_gradually(optax.sgd(0.1), 0.5, when=jp.every(1))
    state = trained(tx)
    assert optax.tree.get(state, "masks") is state.masks
