"""Rules by path: who gets what, what can never apply, and the plan before training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import stepper

import jaxprune as jp

DTYPE_PROMOTION = "standard"  # optax promotes
RNG = np.random.default_rng(0)
PARAMS = {
    "embed": {"embedding": jnp.asarray(RNG.normal(size=(5, 16)), jnp.float32)},
    "block": {
        name: {"kernel": jnp.asarray(RNG.normal(size=(16, 16)), jnp.float32)}
        for name in ("attention", "mlp", "head")
    },
}
SCORES = jp.magnitude(jp.select(PARAMS))


def kept(tree):
    return {path.split("/")[1]: int(np.sum(leaf)) for path, leaf in flat(tree).items()}


def flat(tree):
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(key.key for key in path): leaf for path, leaf in pairs}


@pytest.mark.parametrize(
    ("sparsity", "want"),
    [
        (0.0, {"attention": 256, "mlp": 256, "head": 256}),
        (0.25, {"attention": 192, "mlp": 192, "head": 256}),
        (0.75, {"attention": 128, "mlp": 64, "head": 256}),
        (1.0, {"attention": 128, "mlp": 1, "head": 256}),
    ],
)
def test_a_number_is_a_ceiling_and_none_is_untouched(sparsity, want):
    allocate = jp.allocate_by_path({"attention": 0.5, "head|embed": None})
    assert kept(allocate(SCORES, sparsity)) == want
    traced = jax.jit(allocate)(SCORES, jnp.float32(sparsity))
    assert kept(traced) == want


def test_the_leaves_of_a_rule_are_allocated_together():
    allocate = jp.allocate_by_path({"attention|mlp": jp.allocate_global}, default=0.25)
    keep = allocate(SCORES, 0.9)
    part = {"block": {**SCORES["block"], "head": {"kernel": None}}, "embed": SCORES["embed"]}
    want = jp.allocate_global(part, 0.9)
    assert kept(keep) == {**kept(want), "head": 192}


def test_the_first_rule_that_matches_wins():
    allocate = jp.allocate_by_path({"mlp": 0.25, "block": 0.5})
    assert kept(allocate(SCORES, 0.9)) == {"attention": 128, "mlp": 192, "head": 128}


def test_every_path_gets_its_own_structure():
    mask = jp.mask_by_path(
        {
            "attention": jp.gradual_n_m(2, 4, axis=0),
            "head": lambda s, k: jp.mask_groups(s, k, axes=0, size=4),
        }
    )
    keep = jp.allocate_uniform(SCORES, 0.5)
    masks = jax.jit(mask)(SCORES, keep)
    found = flat(masks)
    columns = found["block/attention/kernel"].reshape(4, 4, 16)
    assert (columns.sum(1) == 2).all()
    heads = np.asarray(found["block/head/kernel"]).reshape(16, 4, 4)
    assert (heads.all((0, 2)) == heads.any((0, 2))).all()
    one = {"w": SCORES["block"]["mlp"]["kernel"]}
    want = jp.mask_topk(one, {"w": 128})["w"]
    np.testing.assert_array_equal(found["block/mlp/kernel"], want)
    assert masks["embed"]["embedding"] is None


def test_scaled_scores():
    saliency = jp.scale_by_path({"mlp": 2.0, "block/": 0.5})
    scores = saliency(jp.select(PARAMS))
    for name, factor in {"attention": 0.5, "mlp": 2.0, "head": 0.5}.items():
        want = factor * SCORES["block"][name]["kernel"]
        np.testing.assert_array_equal(scores["block"][name]["kernel"], want)
    half = jp.select(jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS))
    assert saliency(half)["block"]["mlp"]["kernel"].dtype == jnp.float32


def test_scaled_saliency_keeps_its_memory():
    def total(saliency):
        tx = jp.prune_gradually(
            optax.sgd(0.01),
            0.5,
            when=jp.every(3, begin=2),
            saliency=saliency,
            allocate=jp.allocate_global,
        )
        step, state, params = stepper(tx), tx.init(PARAMS), PARAMS
        for t in range(4):
            params, state = step(params, state, jnp.float32(t))
        return kept(jp.get_masks(state, params))

    energy = jp.accumulate(jp.taylor, 1.0)  # not movement: a factor moves negative scores down
    plain = total(energy)
    favoured = total(jp.scale_by_path({"mlp": 64.0}, saliency=energy))
    assert sum(plain.values()) == sum(favoured.values()) == 384
    assert favoured["mlp"] > plain["mlp"]


RULES = {
    "allocate": jp.allocate_by_path({"attention": 0.5, "head": None}),
    "mask": jp.mask_by_path({"attention": jp.gradual_n_m(2, 4, axis=0)}),
}
TRANSFORMS = {
    "gradual": lambda: jp.prune_gradually(
        optax.adamw(0.01), jp.cubic_sparsity(0.75, 4), when=jp.every(2, end=4), **RULES
    ),
    "packed": lambda: jp.prune_gradually(
        optax.adamw(0.01), jp.cubic_sparsity(0.75, 4), when=jp.every(2, end=4), packed=True, **RULES
    ),
    "ac_dc": lambda: jp.ac_dc(optax.adamw(0.01), 0.75, begin=0, period=2, end=4, **RULES),
    "rigl": lambda: jp.rigl(
        optax.adamw(0.01), 0.75, drop_fraction=0.3, when=jp.every(2), key=jax.random.key(0), **RULES
    ),
}


@pytest.mark.parametrize("method", TRANSFORMS)
def test_under_transforms(method):
    tx = TRANSFORMS[method]()
    step, state, params = stepper(tx), tx.init(PARAMS), PARAMS
    for t in range(6):
        params, state = step(params, state, jnp.float32(t))
    masks = jp.get_masks(state, params)
    assert kept(masks) == {"attention": 128, "mlp": 64, "head": 256}
    groups = masks["block"]["attention"]["kernel"].reshape(4, 4, 16)
    assert (groups.sum(1) == 2).all()


def test_the_plan_says_what_the_pipeline_then_does():
    plan = jp.explain(PARAMS, 0.75, **RULES)
    _, masks = jp.prune(PARAMS, 0.75, **RULES)
    assert {row.path.split("/")[1]: row.kept for row in plan.leaves} == kept(masks)
    words = {row.path.split("/")[1]: (row.allocation, row.structure) for row in plan.leaves}
    assert words == {
        "attention": ("0.5", "gradual_n_m(2, 4)"),
        "mlp": ("allocate_uniform", "mask_topk"),
        "head": ("untouched", "mask_topk"),
    }
    assert plan.sparsity == 1 - (128 + 64 + 256) / 768
    assert plan.by_structure == {"gradual_n_m(2, 4)": 0.5, "mask_topk": 0.375}
    text = str(plan)
    assert "asked for 75.0000%" in text
    assert "embed/embedding" in text
    assert "not governed" in text
    assert "<table>" in plan._repr_html_()
    moved = jp.explain(PARAMS, 0.5, saliency=jp.movement, grads=PARAMS)
    assert moved.sparsity == 0.5


def test_the_plan_notes_leaves_that_are_not_n_m():
    params = {"wide": jnp.ones((8, 32)), "square": jnp.ones((16, 16)), "small": jnp.ones((4, 4))}
    mask = jp.mask_by_path({"": jp.gradual_n_m(2, 4, axis=0)})
    options = {"mask": mask, "prunable": jp.matching("")}
    plan = jp.explain(params, 0.5, allocate=jp.allocate_erk, **options)
    notes = {row.path: row.note for row in plan.leaves}
    assert notes["small"] == "not 2:4, which keeps 8"
    assert notes["square"] == "within 2:4, which keeps 128"
    assert "not 2:4, which keeps 8" in str(plan)
    assert "within 2:4" in plan._repr_html_()
    exact = jp.explain(params, 0.5, allocate=jp.allocate_uniform, **options)
    assert not any(row.note for row in exact.leaves)


def test_the_plan_of_mixed_units_by_granularity():
    from functools import partial

    mask = partial(jp.mask_mixed, units={"mlp": jp.Blocks(4)}, default=jp.Weights())
    plan = jp.explain(PARAMS, 0.5, mask=mask)
    assert list(plan.by_structure) == ["Weights()", "Blocks(block=4, axes=(-2, -1))"]
    removed = sum(row.size - row.kept for row in plan.leaves)
    assert 0 <= removed - 384 < 16


@pytest.mark.parametrize(
    "combine",
    [
        lambda rules: jp.allocate_by_path(dict.fromkeys(rules, 0.5))(SCORES, 0.5),
        lambda rules: jp.mask_by_path(dict.fromkeys(rules, jp.mask_topk))(
            SCORES, jp.allocate_uniform(SCORES, 0.5)
        ),
        lambda rules: jp.scale_by_path(dict.fromkeys(rules, 2.0))(SCORES),
        lambda rules: jp.mask_mixed(
            SCORES, 0.5, {p: jp.Weights() for p in rules}, default=jp.Weights()
        ),
    ],
)
def test_rules_that_cannot_apply(combine):
    with pytest.raises(ValueError, match=r"'mpl' matches none of .*attention/kernel, .*mlp/kernel"):
        combine(["mpl"])
    with pytest.raises(ValueError, match=r"'mlp' can never apply: .*'block'.*mlp/kernel"):
        combine(["block", "mlp"])
    with pytest.raises(ValueError, match=r"embed/embedding, not governed"):
        combine(["embed"])
    with pytest.raises(ValueError, match="no regular expression"):
        combine(["("])


def test_bad_rules():
    with pytest.raises(ValueError, match=r"'mlp': sparsity is 90"):
        jp.allocate_by_path({"mlp": 90})
    with pytest.raises(TypeError, match=r"'mlp': 'half' is no rule here; give a sparsity"):
        jp.allocate_by_path({"mlp": "half"})
    with pytest.raises(ValueError, match=r"'default': sparsity is -1"):
        jp.allocate_by_path({}, default=-1.0)
    with pytest.raises(TypeError, match=r"rule 'mlp' is 0.5; it is a function, such as jp"):
        jp.mask_by_path({"mlp": 0.5})
    for factor in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="'mlp': factor is"):
            jp.scale_by_path({"mlp": factor})
    with pytest.raises(TypeError, match="'mlp': None is no rule here; give a positive number"):
        jp.scale_by_path({"mlp": None})
    for by_path in (jp.allocate_by_path, jp.mask_by_path, jp.scale_by_path):
        with pytest.raises(TypeError, match="rules is list, not a mapping"):
            by_path(["mlp"])
    with pytest.raises(ValueError, match="sparsity is 2"):
        jp.explain(PARAMS, 2.0)
    with pytest.raises(ValueError, match="different trees"):
        jp.mask_by_path({"mlp": jp.mask_topk})(SCORES, {})
