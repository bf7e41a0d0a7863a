"""Bad input raises before anything is computed, and says where, what and how to mend it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp

PARAMS = {"dense": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}}
SCORES = jp.select(PARAMS)
KEEP = {"dense": {"kernel": 3, "bias": None}}
ALLOCATIONS = [jp.allocate_uniform, jp.allocate_erk, jp.allocate_global, jp.allocate_lamp]
WRAPPERS = {
    "prune_gradually": lambda s, **kw: jp.prune_gradually(
        optax.sgd(0.1), s, when=jp.every(1), **kw
    ),
    "prune_below": lambda s, **kw: jp.prune_below(optax.sgd(0.1), s, when=jp.every(1), **kw),
    "rigl": lambda s, **kw: jp.rigl(
        optax.sgd(0.1), s, drop_fraction=0.3, when=jp.every(1), key=jax.random.key(0), **kw
    ),
    "sparse_evolutionary": lambda s, **kw: jp.sparse_evolutionary(
        optax.sgd(0.1), s, drop_fraction=0.3, when=jp.every(1), key=jax.random.key(0), **kw
    ),
}


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, float("nan"), 90])
def test_sparsity_outside_the_unit_interval(sparsity):
    for allocate in ALLOCATIONS:
        with pytest.raises(ValueError, match=r"sparsity is .*\[0, 1\]"):
            allocate(SCORES, sparsity)
    with pytest.raises(ValueError, match="sparsity"):
        jp.prune(PARAMS, sparsity)
    for name in ("prune_gradually", "rigl", "sparse_evolutionary"):
        with pytest.raises(ValueError, match="sparsity"):
            WRAPPERS[name](sparsity)
    with pytest.raises(ValueError, match="final"):
        jp.cubic_sparsity(sparsity, 10)


def test_thresholds_and_fractions():
    with pytest.raises(ValueError, match="threshold is NaN"):
        WRAPPERS["prune_below"](float("nan"))
    with pytest.raises(ValueError, match="threshold is NaN"):
        jp.mask_threshold(SCORES, np.nan)
    with pytest.raises(ValueError, match="drop_fraction is 2"):
        jp.rigl(optax.sgd(1.0), 0.5, drop_fraction=2, when=jp.every(1), key=jax.random.key(0))
    with pytest.raises(ValueError, match="min_keep is -1"):
        jp.allocate_uniform(SCORES, 0.5, min_keep=-1)
    with pytest.raises(ValueError, match="cost of a weight"):
        jp.allocate_global(SCORES, 0.5, costs={"dense": {"kernel": 0.0, "bias": None}})


def test_triggers_are_functions():
    for build in (jp.prune_gradually, jp.train_straight_through):
        with pytest.raises(TypeError, match=r"when is 10; .* jp.every\(10\)"):
            build(optax.sgd(0.1), 0.5, when=10)


def test_triggers_and_schedules():
    for call in (lambda: jp.every(0), lambda: jp.every(1, begin=-1), lambda: jp.every(1, end=-1)):
        with pytest.raises(ValueError, match="every"):
            call()
    with pytest.raises(ValueError, match="steps is 0"):
        jp.cubic_sparsity(0.9, 0)
    with pytest.raises(ValueError, match="begin is -1"):
        jp.cubic_sparsity(0.9, 5, begin=-1)


@pytest.mark.parametrize("params", [{"bias": jnp.ones(3)}, {"emb": {"kernel": jnp.ones((3, 3))}}])
def test_nothing_prunable(params):
    with pytest.raises(ValueError, match="nothing to prune: kernels selects none of the leaves"):
        jp.prune(params, 0.5)
    for wrapper in WRAPPERS.values():
        with pytest.raises(ValueError, match="nothing to prune"):
            wrapper(0.5).init(params)


def test_a_pattern_that_matches_nothing_lists_the_paths():
    with pytest.raises(ValueError, match=r"matching\('conv'\).*dense/kernel"):
        jp.select(PARAMS, jp.matching("conv"))


@pytest.mark.parametrize(
    ("leaf", "error"),
    [
        (jnp.ones((2, 2), jnp.int32), TypeError),
        (jnp.ones((2, 2), jnp.complex64), TypeError),
        (jnp.ones((0, 2)), ValueError),
        ("text", TypeError),
    ],
)
def test_leaves_that_cannot_be_pruned(leaf, error):
    params = {"block": {"odd": leaf}}
    with pytest.raises(error, match="block/odd: selected for pruning"):
        jp.prune(params, 0.5, prunable=jp.matching("odd"))
    for wrapper in WRAPPERS.values():
        with pytest.raises(error, match="block/odd"):
            wrapper(0.5, prunable=jp.matching("odd")).init(params)


@pytest.mark.parametrize("name", WRAPPERS)
def test_update_without_params(name):
    tx = WRAPPERS[name](0.5)
    with pytest.raises(ValueError, match=r"tx\.update\(grads, state, params\)"):
        tx.update(PARAMS, tx.init(PARAMS))


def test_keep_params_masked_without_params():
    tx = jp.keep_params_masked({"dense": {"kernel": jnp.ones((4, 6), bool), "bias": None}})
    with pytest.raises(ValueError, match="params"):
        tx.update(PARAMS, tx.init(PARAMS))


@pytest.mark.parametrize("criterion", [jp.gradient_magnitude, jp.taylor])
def test_gradients_that_are_missing(criterion):
    with pytest.raises(ValueError, match="needs gradients"):
        criterion(SCORES)
    with pytest.raises(ValueError, match="needs gradients"):
        jp.prune(PARAMS, 0.5, saliency=criterion)


def test_random_saliency_without_a_key():
    with pytest.raises(ValueError, match="needs a PRNG key"):
        jp.random_saliency(SCORES)


@pytest.mark.parametrize(
    "masks",
    [
        {"dense": {"kernel": jnp.ones((4, 5), bool), "bias": None}},
        {"dense": {"kernel": jnp.ones((4, 6), bool)}},
        {"other": {"kernel": jnp.ones((4, 6), bool), "bias": None}},
    ],
)
def test_masks_that_do_not_fit(masks):
    for call in (
        lambda: jp.apply_masks(PARAMS, masks),
        lambda: jp.straight_through(PARAMS, masks),
        lambda: jp.keep_params_masked(masks).init(PARAMS),
        lambda: WRAPPERS["prune_gradually"](0.5, masks=masks).init(PARAMS),
        lambda: WRAPPERS["rigl"](0.5, masks=masks).init(PARAMS),
        lambda: jp.summarize(PARAMS, masks),
    ):
        with pytest.raises(ValueError, match=r"(dense|other).*masks"):
            call()


def test_masks_that_are_not_bool():
    masks = {"dense": {"kernel": jnp.ones((4, 6), jnp.float32), "bias": None}}
    with pytest.raises(TypeError, match="dense/kernel: the mask has type float32"):
        jp.apply_masks(PARAMS, masks)


def test_masks_to_start_from_that_contradict_prunable():
    extra = {"dense": {"kernel": jnp.ones((4, 6), bool), "bias": jnp.ones(6, bool)}}
    with pytest.raises(ValueError, match="dense/bias: the masks cover a leaf"):
        WRAPPERS["prune_gradually"](0.5, masks=extra).init(PARAMS)
    less = {"dense": {"kernel": None, "bias": None}}
    with pytest.raises(ValueError, match="dense/kernel: prunable selects"):
        WRAPPERS["rigl"](0.5, masks=less).init(PARAMS)


def test_gradients_that_do_not_fit():
    tx = WRAPPERS["prune_gradually"](0.5)
    wrong = {"dense": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(6)}}
    with pytest.raises(ValueError, match="dense/kernel: updates has shape"):
        tx.update(wrong, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    "keep",
    [{"dense": {"kernel": 25, "bias": None}}, {"dense": {"kernel": -1, "bias": None}}],
)
def test_counts_out_of_range(keep):
    with pytest.raises(ValueError, match="dense/kernel: cannot keep"):
        jp.mask_topk(SCORES, keep)


@pytest.mark.parametrize("keep", [0.5, True, np.float32(7)])
@pytest.mark.parametrize(
    "mask",
    [
        jp.mask_topk,
        partial(jp.mask_groups, axes=0),
        partial(jp.mask_blocks, block=2),
        jp.gradual_n_m(1, 2, axis=0),
    ],
)
def test_counts_that_are_no_whole_numbers(mask, keep):
    """Truncated, a share of the weights to keep would be none."""
    counts = {"dense": {"kernel": keep, "bias": None}}
    for call in (partial(mask, SCORES), jax.jit(partial(mask, SCORES))):
        with pytest.raises(TypeError, match=r"dense/kernel: keep is .*, no whole number"):
            call(counts)


def test_scores_that_do_not_fit():
    """Scores of leaves that are not governed are left alone; a governed leaf without raises."""
    params = {"w": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones((2, 3))}

    def masks_by(saliency):
        always = partial(jp.prune_gradually, optax.sgd(0.1), 0.5, when=jp.every(1))
        tx = always(saliency=saliency)
        return tx.update(params, tx.init(params), params)[1].masks

    every = masks_by(lambda p, g, key=None: jax.tree.map(jnp.abs, params))
    assert every["w"].tolist() == [[False] * 3, [True] * 3]
    assert every["bias"] is None
    with pytest.raises(ValueError, match="scores and masks have different trees, first at w"):
        masks_by(lambda p, g, key=None: {"w": None, "bias": None})


def test_counts_that_do_not_fit():
    with pytest.raises(ValueError, match="keep and scores have different trees"):
        jp.mask_topk(SCORES, {"dense": {"kernel": None, "bias": None}})
    with pytest.raises(ValueError, match="one count per leaf"):
        jp.mask_topk(SCORES, {"dense": {"kernel": jnp.ones(2, int), "bias": None}})


def test_patterns_that_do_not_fit():
    with pytest.raises(ValueError, match="3:2 is no pattern"):
        jp.mask_n_m(SCORES, 3, 2, axis=0)
    with pytest.raises(ValueError, match="dense/kernel: 4 does not divide the 6"):
        jp.mask_n_m(SCORES, 2, 4, axis=1)
    with pytest.raises(ValueError, match="dense/kernel: axes"):
        jp.mask_n_m(SCORES, 2, 4, axis=2)
    with pytest.raises(ValueError, match="dense/kernel: a block of"):
        jp.mask_blocks(SCORES, KEEP, block=5)
    with pytest.raises(ValueError, match="block is"):
        jp.mask_blocks(SCORES, KEEP, block=0)
    with pytest.raises(ValueError, match="dense/kernel: axes"):
        jp.mask_groups(SCORES, KEEP, axes=(0, 0))
    with pytest.raises(ValueError, match="dense/kernel: axes"):
        jp.mask_topk(SCORES, KEEP, axis=7)


def test_states_that_hold_no_masks():
    with pytest.raises(ValueError, match="no pruning state"):
        jp.get_masks(optax.adam(1.0).init(PARAMS), PARAMS)
    state = WRAPPERS["rigl"](0.5).init(PARAMS)
    with pytest.raises(ValueError, match="leaves"):
        jp.get_masks(state, {"dense": {"kernel": jnp.ones((4, 6))}})
    with pytest.raises(TypeError, match=r"the call is get_masks\(state, params\)"):
        jp.get_masks(PARAMS, state)
    with pytest.raises(TypeError, match=r"the call is summarize\(params, state\)"):
        jp.summarize(state, PARAMS)
    with pytest.raises(ValueError, match="packed masks"):
        jp.unpack_masks({"w": jnp.ones((2, 2), jnp.uint8)}, {"w": jnp.ones((2, 40))})


def test_errors_come_at_trace_time():
    with pytest.raises(ValueError, match="4 does not divide"):
        jax.eval_shape(lambda s: jp.mask_n_m(s, 2, 4, axis=1), SCORES)
    with pytest.raises(ValueError, match="needs gradients"):
        jax.eval_shape(lambda p: jp.prune(p, 0.5, saliency=jp.taylor), PARAMS)


def test_steps_that_are_no_functions():
    for step, value in (("allocate", 0.5), ("mask", "n_m"), ("prunable", "kernel")):
        with pytest.raises(TypeError, match=f"{step} is {value!r}; it is a function, such as jp"):
            jp.prune(PARAMS, 0.5, **{step: value})


STEPS = {
    "saliency": [jp.snip, jp.wanda],
    "allocate": [jp.allocate_by_path],
    "mask": [jp.mask_n_m, partial(jp.mask_n_m, n=2, m=4, axis=0), jp.mask_groups, jp.gradual_n_m],
    "prunable": [jp.matching],
}


@pytest.mark.parametrize(("step", "value"), [(s, v) for s, values in STEPS.items() for v in values])
def test_steps_that_want_other_arguments(step, value):
    match = rf"{step} is .*, which cannot be called with \(.*; give a function such as jp"
    sgd, when, key = optax.sgd(0.1), jp.every(1), jax.random.key(0)
    wrong = {step: value}
    dropped = {"drop" if step == "saliency" else step: value}
    for build in (
        lambda: jp.prune_gradually(sgd, 0.5, when=when, **wrong),
        lambda: jp.train_straight_through(sgd, 0.5, when=when, **wrong),
        lambda: jp.ac_dc(sgd, 0.5, begin=0, period=1, end=2, **wrong),
        lambda: jp.granet(sgd, 0.5, when=when, key=key, **dropped),
        lambda: jp.explain(PARAMS, 0.5, **wrong),
    ):
        with pytest.raises(TypeError, match=match.replace("saliency is", "(saliency|drop) is")):
            build()
    if value is not jp.wanda:
        with pytest.raises(TypeError, match=match):
            jp.prune(PARAMS, 0.5, **wrong)


def test_what_a_step_that_wants_other_arguments_lacks():
    with pytest.raises(TypeError, match=r"mask_groups.*'axes'.*partial\(jp.mask_groups, axes=0\)"):
        jp.prune(PARAMS, 0.5, mask=jp.mask_groups)
    with pytest.raises(TypeError, match=r"snip.*'batches'.* comes first: scores = "):
        jp.prune(PARAMS, 0.5, saliency=jp.snip)
    with pytest.raises(ValueError, match=r"wanda needs norms; pass jp\.input_norms"):
        jp.prune(PARAMS, 0.5, saliency=jp.wanda)
    with pytest.raises(TypeError, match=r"sparsity is cubic_sparsity.*'steps'"):
        WRAPPERS["prune_gradually"](jp.cubic_sparsity)
    with pytest.raises(TypeError, match=r"rule 'dense' is mask_n_m.*'m'"):
        jp.mask_by_path({"dense": jp.mask_n_m})
    with pytest.raises(TypeError, match=r"rule 'dense' is allocate_by_path"):
        jp.allocate_by_path({"dense": jp.allocate_by_path})
    for build in (lambda s: jp.scale_by_path({}, saliency=s), lambda s: jp.accumulate(s, 0.5)):
        with pytest.raises(TypeError, match="saliency is snip"):
            build(jp.snip)
    with pytest.raises(TypeError, match=r"saliency is snip.*\(params, norms\)"):
        jp.by_saliency(jp.snip)


@pytest.mark.parametrize("method", ["sparsegpt", jp.wanda, jp.magnitude, jp.by_saliency])
def test_layerwise_methods_that_are_none(method):
    for target in ({"sparsity": 0.5}, {"n_m": (2, 4)}):
        with pytest.raises(TypeError, match=r"method is .*jp\.by_saliency\(jp\.wanda\)"):
            jp.prune_layerwise(_dense, PARAMS, [jnp.ones((2, 4))], method=method, **target)


@pytest.mark.parametrize("key", [0, "0", np.uint32(0), jax.random.split(jax.random.key(0), 3)])
def test_keys_that_are_none(key):
    sgd, always = optax.sgd(0.1), {"when": jp.every(1)}
    for call in (
        lambda: jp.rigl(sgd, 0.5, key=key, drop_fraction=0.3, **always),
        lambda: jp.sparse_evolutionary(sgd, 0.5, key=key, drop_fraction=0.3, **always),
        lambda: jp.granet(sgd, 0.5, key=key, **always),
        lambda: jp.ac_dc(sgd, 0.5, begin=0, period=1, end=2, key=key),
        lambda: jp.prune_gradually(sgd, 0.5, key=key, **always),
        lambda: jp.top_kast(sgd, 0.5, key=key, **always),
        lambda: jp.explain(PARAMS, 0.5, key=key),
        lambda: jp.random_saliency(SCORES, key=key),
    ):
        with pytest.raises(
            TypeError, match=r"key is .*; it is one PRNG key, .*jax.random.key\(0\)"
        ):
            call()
    with pytest.raises(TypeError, match="key is None"):
        jp.granet(sgd, 0.5, key=None, **always)


def test_raw_keys_pass():
    jp.random_saliency(SCORES, key=jax.random.PRNGKey(0))
    jax.eval_shape(lambda key: jp.random_saliency(SCORES, key=key), jax.random.key(0))


@pytest.mark.parametrize("schedule", [optax.linear_schedule(0, 90, 100), lambda step: np.nan])
def test_schedules_in_percent(schedule):
    sgd, always, key = optax.sgd(0.1), {"when": jp.every(1)}, jax.random.key(0)
    for build in (
        lambda: jp.prune_gradually(sgd, schedule, **always),
        lambda: jp.granet(sgd, schedule, key=key, **always),
        lambda: jp.train_straight_through(sgd, schedule, **always),
    ):
        with pytest.raises(ValueError, match=r"sparsity is a schedule that is (90|nan) in the end"):
            build()
    jp.prune_gradually(sgd, lambda step: step / 1000, **always)  # clamped past step 1,000
    falling = optax.cosine_decay_schedule(30.0, 75)
    with pytest.raises(ValueError, match="drop_fraction is a schedule that is 30 at step 0"):
        jp.rigl(sgd, 0.5, key=key, drop_fraction=falling, **always)


def test_schedules_that_round_past_one_are_clamped():
    tx = WRAPPERS["prune_gradually"](lambda step: np.float32(1.0 + 1e-6))
    assert tx.update(PARAMS, tx.init(PARAMS), PARAMS)[1].sparsity == 1.0


@pytest.mark.parametrize("batches", [jnp.ones((2, 4)), np.ones((3, 2, 4)), {"x": jnp.ones((2, 4))}])
def test_one_batch_where_several_belong(batches):
    def loss(params, x):
        return jnp.sum(_dense(params, x))

    for call in (
        lambda: jp.prune_layerwise(_dense, PARAMS, batches, 0.5),
        lambda: jp.input_norms(_dense, PARAMS, batches),
        lambda: jp.input_grams(_dense, PARAMS, batches),
        lambda: jp.snip(loss, PARAMS, batches),
        lambda: jp.fisher(loss, PARAMS, batches),
    ):
        with pytest.raises(TypeError, match=r"batches is one .*: give \[x\] for the one batch x"):
            call()


def _dense(params, x):
    return x @ params["dense"]["kernel"]


def test_what_is_no_number_no_optimizer_and_no_state():
    schedule = jp.cubic_sparsity(0.9, 10)
    for call in (
        lambda: jp.prune(PARAMS, schedule),
        lambda: jp.allocate_uniform(SCORES, schedule),
        lambda: WRAPPERS["rigl"](schedule),
        lambda: jp.cubic_sparsity(schedule, 10),
        lambda: jp.prune(PARAMS, "50%"),
    ):
        with pytest.raises(TypeError, match=r"is .*; it is a number in \[0, 1\] here"):
            call()
    for n, end in ((10.5, None), (10, 99.5)):
        with pytest.raises(TypeError, match=r"is (10|99)\.5; it is a whole number"):
            jp.every(n, end=end)
    with pytest.raises(ValueError, match="nothing to prune"):
        jp.prune({}, 0.5)
    for inner in (optax.sgd, 0.1):
        for wrap in (jp.prune_gradually, jp.train_straight_through):
            with pytest.raises(TypeError, match=r"inner is .*; it is an optax transform"):
                wrap(inner, 0.5, when=jp.every(1))

    gradual, straight = (
        wrap(optax.sgd(0.1), 0.9, when=jp.every(1))
        for wrap in (jp.prune_gradually, jp.train_straight_through)
    )
    packed = jp.prune_gradually(optax.sgd(0.1), 0.9, when=jp.every(1), packed=True)
    for tx, state, error, message in (
        (gradual, optax.sgd(0.1).init(PARAMS), TypeError, "not that of a pruning transform"),
        (gradual, straight.init(PARAMS), ValueError, "of another pruning method"),
        (straight, gradual.init(PARAMS), ValueError, "of another pruning method"),
        (gradual, packed.init(PARAMS), ValueError, "with packed=True"),
        (packed, gradual.init(PARAMS), ValueError, "leave packed=True out"),
    ):
        with pytest.raises(error, match=message):
            tx.update(PARAMS, state, PARAMS)


def test_states_without_masks():
    with pytest.raises(ValueError, match="neither a tree like params nor an optimizer state that"):
        jp.summarize(PARAMS, optax.adam(0.1).init(PARAMS))


def test_masks_that_are_none():
    with pytest.raises(TypeError, match="masks are bool"):
        jp.density(jp.pack_masks({"w": jnp.ones((2, 8), bool)}))
    with pytest.raises(TypeError, match="dense/bias: the mask has type float"):
        jp.density(jp.prune(PARAMS, 0.5))


def test_arguments_in_the_wrong_order():
    pruned, masks = jp.prune(PARAMS, 0.5)
    for call in (jp.apply_masks, jp.summarize, jp.straight_through):
        with pytest.raises(TypeError, match=r"params holds the bools.*\(params, masks\)"):
            call(masks, pruned)
    apply, x = (lambda p, x: x @ p["dense"]["kernel"]), jnp.ones((3, 4))
    for call in (
        lambda: jp.prune_layerwise(PARAMS, apply, [x], 0.5),
        lambda: jp.input_grams(PARAMS, apply, [x]),
        lambda: jp.fan_in_axes(PARAMS, apply, x),
    ):
        with pytest.raises(TypeError, match=r"apply is dict; .* function apply\(params, \*batch\)"):
            call()


def test_what_layerwise_pruning_cannot_use():
    apply, batches = (lambda p, x: x @ p["dense"]["kernel"]), [jnp.ones((3, 4))]
    with pytest.raises(TypeError, match=r"outside of jax\.jit"):
        jax.jit(lambda p: jp.prune_layerwise(apply, p, batches, 0.5)[0])(PARAMS)
    with pytest.raises(ValueError, match=r"dense/kernel: sparsity is 50; it is a fraction"):
        jp.prune_layerwise(apply, PARAMS, batches, {"dense": {"kernel": 50, "bias": None}})
    with pytest.raises(ValueError, match="dense/kernel: sparsity is None, but"):
        jp.prune_layerwise(apply, PARAMS, batches, {"dense": {"kernel": None, "bias": 0.5}})
    with pytest.raises(ValueError, match="sparsity and params have different trees"):
        jp.prune_layerwise(apply, PARAMS, batches, {"other": {"kernel": 0.5, "bias": None}})
    every = {"dense": {"kernel": 0.5, "bias": 0.5}}  # the bias is not governed
    options = {"method": jp.by_saliency(jp.wanda)}
    _, masks, _ = jp.prune_layerwise(apply, PARAMS, batches, every, **options)
    assert float(jp.density(masks)) == 0.5
    broken = {"dense": {"kernel": jnp.full((4, 6), jnp.nan), "bias": jnp.ones(6)}}
    for method in (jp.sparsegpt, jp.alps):
        method = partial(method, damping=1.0)
        with pytest.raises(ValueError, match="dense/kernel: the weight holds NaN"):
            jp.prune_layerwise(apply, broken, batches, 0.5, method=method)


def test_a_pattern_that_is_none():
    with pytest.raises(ValueError, match=r"'\*kernel', which is no regular expression: nothing to"):
        jp.matching("*kernel")
