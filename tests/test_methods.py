"""Each method's update rule against a loop in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp

RATE = np.float32(0.1)
SHAPE = (5, 8)
W0 = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
GRADS = np.random.default_rng(1).normal(size=(20, *SHAPE)).astype(np.float32)


def largest(scores, k):
    mask = np.zeros(scores.size, bool)
    mask[np.argsort(-scores.ravel(), kind="stable")[:k]] = True
    return mask.reshape(scores.shape)


def train(tx, steps):
    """The visible weights, masks and states under the gradients of the script."""
    params, path = {"kernel": jnp.asarray(W0)}, []
    state = tx.init(params)
    update = jax.jit(tx.update)
    for t in range(steps):
        updates, state = update({"kernel": jnp.asarray(GRADS[t])}, state, params)
        params = optax.apply_updates(params, updates)
        path.append((np.asarray(params["kernel"]), np.asarray(state.masks["kernel"]), state))
    return path


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_gradual_pruning():
    schedule = jp.cubic_sparsity(0.8, 6)
    tx = jp.prune_gradually(optax.sgd(RATE), schedule, when=jp.every(2, end=6))
    w, mask = W0, np.ones(SHAPE, bool)
    for t, (seen, found, _) in enumerate(train(tx, 9)):
        if t in (0, 2, 4, 6):
            keep = 40 - int(np.floor(float(schedule(t)) * 40 + 0.5))
            mask = mask & largest(np.where(mask, np.abs(w), -np.inf), keep)
        w = np.where(mask, w - RATE * GRADS[t], 0)
        np.testing.assert_array_equal(found, mask)
        close(seen, w)


def test_one_shot_when_the_trigger_fires_once():
    tx = jp.prune_gradually(optax.sgd(RATE), 0.5, when=jp.every(1, begin=3, end=3))
    kept = [found.sum() for _, found, _ in train(tx, 6)]
    assert kept == [40, 40, 40, 20, 20, 20]


def test_movement():
    tx = jp.prune_gradually(
        optax.sgd(RATE), 0.5, when=jp.every(1, begin=4, end=4), saliency=jp.movement
    )
    w, total, mask = W0, np.zeros(SHAPE, np.float32), np.ones(SHAPE, bool)
    for t, (seen, found, _) in enumerate(train(tx, 6)):
        total = total - w * GRADS[t]
        if t == 4:
            mask = largest(total, 20)
        w = np.where(mask, w - RATE * GRADS[t], 0)
        np.testing.assert_array_equal(found, mask)
        close(seen, w)


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_accumulate_sums_and_forgets(decay):
    criterion = jp.accumulate(jp.taylor, decay)
    params = {"kernel": jnp.asarray(W0), "bias": None}
    memory = criterion.init(params)
    want = np.zeros(SHAPE)
    for t in range(4):
        scores, memory = criterion.update(params, {"kernel": GRADS[t], "bias": None}, memory)
        want = decay * want + np.abs(W0 * GRADS[t])
        close(scores["kernel"], want)
    bad = {"kernel": jnp.full(SHAPE, jnp.nan), "bias": None}
    scores, after = criterion.update(params, bad, memory)
    assert np.isnan(scores["kernel"]).all()
    np.testing.assert_array_equal(after["kernel"], memory["kernel"])


def test_ac_dc():
    tx = jp.ac_dc(optax.sgd(RATE), 0.75, begin=2, period=3, end=11)
    w, mask = W0, np.ones(SHAPE, bool)
    for t, (seen, found, state) in enumerate(train(tx, 15)):
        old = mask
        if t in (2, 8):  # compressed from 2, dense from 5, compressed from 8, and for good from 11
            mask = largest(np.abs(w), 10)
        if t == 5:
            mask = np.ones(SHAPE, bool)
        w = np.where(mask & old, w - RATE * GRADS[t], 0)
        np.testing.assert_array_equal(found, mask)
        close(seen, w)
        assert float(state.sparsity) == (0.75 if t in (2, 3, 4) or t >= 8 else 0.0)


@pytest.mark.parametrize(("end", "recomputed"), [(7, True), (9, False)])
def test_ac_dc_ends_compressed(end, recomputed):
    tx = jp.ac_dc(optax.sgd(RATE), 0.75, begin=2, period=3, end=end)
    path = train(tx, 14)
    assert [found.sum() for _, found, _ in path[end:]] == [10] * (14 - end)
    changed = not np.array_equal(path[end][1], path[end - 1][1])
    assert changed == recomputed


def test_granet():
    schedule = jp.cubic_sparsity(0.75, 6)
    tx = jp.granet(
        optax.sgd(RATE), schedule, when=jp.every(2, end=6), regeneration=0.5, key=jax.random.key(0)
    )
    w, mask = W0, np.ones(SHAPE, bool)
    for t, (seen, found, _) in enumerate(train(tx, 9)):
        old = mask
        if t in (0, 2, 4, 6):
            keep = 40 - int(np.floor(float(schedule(t)) * 40 + 0.5))
            stay = min(keep - int(np.floor(keep * 0.5 + 0.5)), old.sum())
            best = largest(np.where(old, np.abs(w), -np.inf), stay)
            mask = largest(np.where(best, np.inf, np.abs(GRADS[t])), keep)
        w = np.where(mask & old, w - RATE * GRADS[t], 0)
        np.testing.assert_array_equal(found, mask)
        close(seen, w)


def test_rigl():
    start = largest(np.abs(W0), 16)
    tx = jp.rigl(
        optax.sgd(RATE),
        0.6,
        drop_fraction=0.25,
        when=jp.every(2, begin=1),
        key=jax.random.key(0),
        masks={"kernel": jnp.asarray(start)},
    )
    w, mask = W0, start
    for t, (seen, found, _) in enumerate(train(tx, 9)):
        old = mask
        if t % 2 == 1:
            best = largest(np.where(old, np.abs(w), -np.inf), 12)
            mask = largest(np.where(best, np.inf, np.abs(GRADS[t])), 16)
        w = np.where(mask & old, w - RATE * GRADS[t], 0)
        np.testing.assert_array_equal(found, mask)
        close(seen, w)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_straight_through_and_sr_ste(decay):
    options = {"when": jp.every(2), "allocate": jp.allocate_uniform}
    tx = (
        jp.sr_ste(optax.sgd(RATE), 0.75, decay=decay, **options)
        if decay
        else jp.train_straight_through(optax.sgd(RATE), 0.75, **options)
    )
    dense, mask = W0, np.ones(SHAPE, bool)
    for t, (seen, found, state) in enumerate(train(tx, 9)):
        dense = dense - RATE * (GRADS[t] + np.float32(decay) * np.where(mask, 0, dense))
        if t % 2 == 0:
            mask = largest(np.abs(np.asarray(state.dense[0]["kernel"])), 10)
        close(state.dense[0]["kernel"], dense)
        np.testing.assert_array_equal(found, mask)
        np.testing.assert_array_equal(seen, np.where(mask, state.dense[0]["kernel"], 0))


def test_straight_through_weights_return_with_what_they_learned():
    tx = jp.train_straight_through(optax.sgd(1.0), 0.5, when=jp.every(1))
    params = {"kernel": jnp.array([[1.0, 2.0]])}
    state, shown = tx.init(params), []
    for g in ([0.0, 0.0], [-4.0, 0.0], [0.0, -9.0]):
        updates, state = tx.update({"kernel": jnp.array([g])}, state, params)
        params = optax.apply_updates(params, updates)
        shown.append(params["kernel"][0].tolist())
    assert shown == [[0.0, 2.0], [5.0, 0.0], [0.0, 11.0]]


def test_top_kast():
    penalty, density = np.float32(0.05), np.float32(0.25)
    tx = jp.top_kast(
        optax.sgd(RATE),
        0.75,
        backward_sparsity=0.5,
        penalty=0.05,
        when=jp.every(2),
    )
    dense, forward, backward = W0, np.ones(SHAPE, bool), np.ones(SHAPE, bool)
    for t, (seen, found, state) in enumerate(train(tx, 9)):
        strength = np.where(forward, penalty, penalty / density)
        step = np.where(backward, GRADS[t] + strength * dense, 0)
        dense = np.where(backward, dense - RATE * step, dense)
        close(state.dense[0]["kernel"], dense)
        if t % 2 == 0:
            exact = np.abs(np.asarray(state.dense[0]["kernel"]))
            forward, backward = largest(exact, 10), largest(exact, 20)
        np.testing.assert_array_equal(found, forward)
        np.testing.assert_array_equal(state.dense[1]["kernel"], backward)
        np.testing.assert_array_equal(seen, np.where(forward, state.dense[0]["kernel"], 0))
        assert not np.any(forward & ~backward)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("method", [jp.train_straight_through, jp.top_kast])
def test_what_the_model_sees_is_the_masked_dense_weight_to_the_bit(method, dtype):
    tx = method(optax.sgd(0.01, momentum=0.9), 0.6, when=jp.every(3))
    params = {"kernel": jnp.asarray(W0, dtype), "bias": jnp.zeros(8, dtype)}
    state = tx.init(params)
    for t in range(12):
        grads = {"kernel": jnp.asarray(GRADS[t], dtype), "bias": jnp.ones(8, dtype)}
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
        shown = jnp.where(state.masks["kernel"], state.dense[0]["kernel"], jnp.zeros((), dtype))
        np.testing.assert_array_equal(
            np.asarray(params["kernel"], np.float32), np.asarray(shown, np.float32)
        )
    assert float(params["bias"][0]) < 0


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("method", [jp.train_straight_through, jp.top_kast])
def test_what_the_model_sees_is_exact_where_the_compiler_fuses(method, dtype):
    """The tests compile without optimization; users do not, and products fuse with sums there."""
    tx = method(optax.sgd(0.03, momentum=0.9), 0.6, when=jp.every(3))

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = {"kernel": jnp.asarray(W0, dtype)}
    state = tx.init(params)
    grads = [{"kernel": jnp.asarray(g, dtype)} for g in GRADS]
    options = {"xla_backend_optimization_level": 3}
    compiled = jax.jit(step).lower(params, state, grads[0]).compile(options)
    for g in grads:
        params, state = compiled(params, state, g)
        shown = jnp.where(state.masks["kernel"], state.dense[0]["kernel"], jnp.zeros((), dtype))
        np.testing.assert_array_equal(
            np.asarray(params["kernel"], np.float32), np.asarray(shown, np.float32)
        )


def test_rewind():
    early = {"kernel": jnp.asarray(W0), "bias": jnp.arange(3.0)}
    late = jax.tree.map(lambda p: p + 1, early)
    masks = {"kernel": jnp.asarray(largest(np.abs(W0), 7)), "bias": None}
    back = jp.rewind(late, early, masks)
    np.testing.assert_array_equal(back["kernel"], np.where(masks["kernel"], W0, 0))
    np.testing.assert_array_equal(back["bias"], early["bias"])
    with pytest.raises(ValueError, match="kernel: early_params has type bfloat16"):
        jp.rewind(late, {**early, "kernel": early["kernel"].astype(jnp.bfloat16)}, masks)
    with pytest.raises(ValueError, match="kernel: early_params has shape"):
        jp.rewind(late, {**early, "kernel": jnp.ones((2, 2))}, masks)


def test_a_traced_sparsity_has_no_name():
    @jax.jit
    def kept(sparsity):
        tx = jp.prune_gradually(optax.sgd(RATE), lambda step: sparsity, when=jp.every(1))
        params = {"kernel": jnp.asarray(W0)}
        _, state = tx.update(params, tx.init(params), params)
        assert list(state.target) == ["traced"]
        return jp.density(state.masks)

    assert (float(kept(0.5)), float(kept(0.75))) == (0.5, 0.25)


def test_bad_numbers():
    adam, always = optax.adam(1e-3), jp.every(1)
    key = jax.random.key(0)
    for call, match in (
        (lambda: jp.accumulate(jp.taylor, 1.5), "decay is 1.5"),
        (lambda: jp.ac_dc(adam, 0.5, begin=5, period=1, end=4), "begin 5"),
        (lambda: jp.ac_dc(adam, 0.5, begin=0, period=0, end=4), "period 0"),
        (lambda: jp.granet(adam, 0.5, when=always, key=key, regeneration=2), "regeneration is 2"),
        (lambda: jp.sr_ste(adam, 0.5, when=always, decay=-1), "decay is -1"),
        (lambda: jp.top_kast(adam, 0.5, when=always, backward_sparsity=0.6), "cannot be larger"),
        (lambda: jp.top_kast(adam, 0.5, when=always, penalty=-1), "penalty is -1"),
        (lambda: jp.train_straight_through(adam, 2.0, when=always), "sparsity is 2"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_other_patterns_need_no_new_code():
    """N:M RigL and block AC/DC: ``mask`` is open in every method."""

    def two_of_four(scores, keep):
        del keep
        return jp.mask_n_m(scores, 2, 4, axis=-1)

    tx = jp.rigl(
        optax.sgd(RATE),
        0.5,
        drop_fraction=0.3,
        when=jp.every(2),
        key=jax.random.key(0),
        mask=two_of_four,
    )
    for _, found, _ in train(tx, 6):
        assert (found.reshape(5, 2, 4).sum(-1) == 2).all()

    def blocks(scores, keep):
        return jp.mask_blocks(scores, keep, block=(1, 4))

    tx = jp.ac_dc(optax.sgd(RATE), 0.5, begin=0, period=2, end=8, mask=blocks)
    found = train(tx, 9)[-1][1]
    assert found.sum() == 20
    assert set(found.reshape(5, 2, 4).sum(-1).ravel().tolist()) == {0, 4}


def test_endless_scores_do_not_break_counts():
    params = {"kernel": jnp.array([[0.0, 5, 0, 0, 0, 0, 3, 0, 2, 1]])}
    masks = {"kernel": jnp.array([[0, 1, 0, 1, 1, 1, 1, 1, 1, 1]], bool)}

    def logarithm(params, grads=None, *, key=None):
        return jax.tree.map(lambda w: jnp.log(jnp.abs(w)), params)

    tx = jp.prune_gradually(optax.sgd(0.0), 0.5, when=jp.every(1), saliency=logarithm, masks=masks)
    zeros = jax.tree.map(jnp.zeros_like, params)
    _, state = tx.update(zeros, tx.init(params), params)
    assert int(state.masks["kernel"].sum()) == 5


def test_endless_gradients_replace_the_share_that_was_asked_for():
    params = {"kernel": jnp.arange(1.0, 11.0)[None]}
    masks = {"kernel": jnp.array([[0] * 5 + [1] * 5], bool)}
    tx = jp.rigl(
        optax.sgd(0.0),
        0.5,
        key=jax.random.key(0),
        drop_fraction=0.2,
        when=jp.every(1),
        masks=masks,
    )
    grads = {"kernel": jnp.array([[jnp.inf] * 5 + [0.0] * 5])}
    _, state = tx.update(grads, tx.init(params), params)
    assert state.masks["kernel"].astype(int).tolist() == [[1, 0, 0, 0, 0, 0, 1, 1, 1, 1]]
