"""Training loops of every kind: no line changes but the optimizer."""

from functools import partial

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training.train_state import TrainState

import jaxprune as jp

DTYPE_PROMOTION = "standard"  # layers and optimizers promote
KEY = jax.random.key(0)
X = jax.random.normal(KEY, (32, 12))
Y = jnp.sin(X[:, :1])
STEPS = 12


def optimizer(**options):
    return jp.prune_gradually(
        optax.adamw(1e-2), jp.cubic_sparsity(0.75, 8), when=jp.every(2, end=8), **options
    )


def sparse(params, masks):
    """All kernels are 75 % zero, where the masks say so."""
    for leaf, mask in zip(jax.tree.leaves(params), jax.tree.leaves(masks), strict=False):
        if mask.shape == leaf.shape:
            assert not np.any(np.asarray(leaf)[~np.asarray(mask)])
    assert abs(float(jp.density(masks)) - 0.25) < 0.02


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.tanh(nn.Dense(16)(x)))


def mse(params, x=X, y=Y):
    return jnp.mean(jnp.square(Linen().apply(params, x) - y))


def test_bare_jit_loop():
    tx, params = optimizer(), Linen().init(KEY, X)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(mse)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    for _ in range(STEPS):
        params, state, _ = step(params, state)
    sparse(jp.select(params), jp.get_masks(state, params))


def test_train_state():
    state = TrainState.create(apply_fn=Linen().apply, params=Linen().init(KEY, X), tx=optimizer())

    @jax.jit
    def step(state):
        return state.apply_gradients(grads=jax.grad(mse)(state.params))

    for _ in range(STEPS):
        state = step(state)
    sparse(jp.select(state.params), jp.get_masks(state.opt_state, state.params))


def test_scan():
    tx, params = optimizer(), Linen().init(KEY, X)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(mse)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), None, STEPS)[0]

    params, state = train(params)
    sparse(jp.select(params), jp.get_masks(state, params))


def test_nnx():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Linear(12, 16, rngs=rngs), nnx.Linear(16, 1, rngs=rngs)

        def __call__(self, x):
            return self.b(jnp.tanh(self.a(x)))

    model = Model(nnx.Rngs(0))
    opt = nnx.Optimizer(model, optimizer(), wrt=nnx.Param)

    @nnx.jit
    def step(model, opt):
        opt.update(model, nnx.grad(lambda m: jnp.mean(jnp.square(m(X) - Y)))(model))

    for _ in range(STEPS):
        step(model, opt)
    params = nnx.state(model, nnx.Param)
    sparse(jp.select(params), jp.get_masks(opt.opt_state, params))


def test_haiku():
    net = hk.without_apply_rng(
        hk.transform(lambda x: hk.Linear(1)(jnp.tanh(hk.Linear(16, name="in")(x))))
    )
    tx, params = optimizer(), net.init(KEY, X)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.mean(jnp.square(net.apply(p, X) - Y)))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(STEPS):
        params, state = step(params, state)
    sparse(jp.select(params), jp.get_masks(state, params))


def test_equinox():
    model = eqx.nn.MLP(12, 1, 16, 2, key=KEY)
    tx = optimizer()
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        def loss(model):
            return jnp.mean(jnp.square(jax.vmap(model)(X) - Y))

        grads = eqx.filter_grad(loss)(model)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state

    for _ in range(STEPS):
        model, state = step(model, state)
    params = eqx.filter(model, eqx.is_inexact_array)
    sparse(jp.select(params), jp.get_masks(state, params))


def test_gradient_accumulation():
    tx, params = optax.MultiSteps(optimizer(), every_k_schedule=2), Linen().init(KEY, X)
    state = tx.init(params)

    @partial(jax.jit, static_argnums=2)
    def step(params, state, half):
        grads = jax.grad(mse)(params, X[half * 16 :][:16], Y[half * 16 :][:16])
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for t in range(2 * STEPS):
        params, state = step(params, state, t % 2)
    sparse(jp.select(params), jp.get_masks(state, params))


def test_vmap_over_seeds():
    tx = optimizer()
    many = jax.vmap(lambda key: Linen().init(key, X))(jax.random.split(KEY, 3))

    def step(params, state):
        updates, state = tx.update(jax.grad(mse)(params), state, params)
        return optax.apply_updates(params, updates), state

    together, state = jax.jit(jax.vmap(step)), jax.vmap(tx.init)(many)
    for _ in range(STEPS):
        many, state = together(many, state)
    for i in range(3):
        one, mine = jax.tree.map(lambda leaf, i=i: leaf[i], (many, state))
        sparse(jp.select(one), jp.get_masks(mine, one))


def test_mixed_precision():
    """bfloat16 in the model, float32 masters in the loop."""
    tx, masters = optimizer(), Linen().init(KEY, X)
    state = tx.init(masters)

    @jax.jit
    def step(masters, state):
        half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), masters)
        grads = jax.grad(lambda p: mse(p, X.astype(jnp.bfloat16), Y))(half)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        updates, state = tx.update(grads, state, masters)
        return optax.apply_updates(masters, updates), state

    for _ in range(STEPS):
        masters, state = step(masters, state)
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), masters)
    sparse(jp.select(half), jp.get_masks(state, half))


def test_triggers_fire_at_steps_of_any_type():
    trigger = jp.every(10, begin=5, end=27)
    for dtype in (jnp.int32, jnp.uint32, jnp.uint8, jnp.float32):
        fired = jax.vmap(trigger)(jnp.arange(32).astype(dtype))
        assert np.flatnonzero(fired).tolist() == [5, 15, 25, 27]
