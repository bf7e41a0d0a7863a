"""Bad input raises before anything is computed, and says where, what and how to mend it."""

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
