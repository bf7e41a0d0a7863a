"""Saved in the middle, restored in another process, continued: as if it had never stopped."""

import os
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from cases import params, stepper

import jaxprune as jp

DTYPE_PROMOTION = "standard"  # optax promotes
HERE = Path(__file__).parent
METHODS = {
    "gradual": lambda sparsity=0.8: jp.prune_gradually(
        optax.adamw(0.01), jp.cubic_sparsity(sparsity, 9), when=jp.every(3, end=9), packed=True
    ),
    "movement": lambda sparsity=0.8: jp.prune_gradually(
        optax.adamw(0.01), sparsity, when=jp.every(4), saliency=jp.movement
    ),
    "rigl": lambda sparsity=0.8: jp.rigl(
        optax.sgd(0.01, momentum=0.9),
        sparsity,
        drop_fraction=0.3,
        when=jp.every(2),
        key=jax.random.key(1),
    ),
    "straight_through": lambda sparsity=0.8: jp.train_straight_through(
        optax.adamw(0.01), sparsity, when=jp.every(2)
    ),
}


def train(tx, p, state, first, last):
    step = stepper(tx)
    for t in range(first, last):
        p, state = step(p, state, jnp.float32(t))
    return p, state


def save(folder, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, tree)


def restore(folder, like):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder, jax.eval_shape(lambda: like))


@pytest.mark.filterwarnings("ignore::UserWarning:orbax", "ignore::DeprecationWarning:orbax")
@pytest.mark.usual("rigl", "straight_through")
@pytest.mark.parametrize("method", METHODS)
def test_continues_in_a_new_process(method, tmp_path):
    tx, p = METHODS[method](), params()
    half = train(tx, p, tx.init(p), 0, 5)
    save(tmp_path / "half", half)
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(HERE), str(HERE.parent)))}
    done = subprocess.run(
        [sys.executable, __file__, method, tmp_path / "half", tmp_path / "end"],
        env=env | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    whole = train(tx, *half, 5, 12)
    chex.assert_trees_all_equal(restore(tmp_path / "end", whole), whole)


@pytest.mark.parametrize("method", METHODS)
def test_another_tree_raises(method):
    tx, p = METHODS[method](), params()
    state = tx.init(p)
    other = {**p, "head": {"kernel": jnp.ones((16, 16)), "bias": jnp.ones(16)}}
    with pytest.raises(ValueError, match="head/"):
        tx.update(other, state, other)


@pytest.mark.filterwarnings("ignore::UserWarning:orbax", "ignore::DeprecationWarning:orbax")
@pytest.mark.parametrize("method", METHODS)
def test_another_sparsity_raises(method, tmp_path):
    p = params()
    theirs, ours = METHODS[method](0.8), METHODS[method](0.9)
    state = theirs.init(p)
    save(tmp_path / "saved", state)
    with pytest.raises(ValueError, match=r"0\.[89]"):
        restore(tmp_path / "saved", ours.init(p))
    with pytest.raises(ValueError, match=r"made for a target of 0\.8, this transform's is 0\.9"):
        jax.eval_shape(ours.update, p, state, p)


def test_a_crash_between_two_saves_loses_only_the_steps_since(tmp_path):
    tx, p = METHODS["rigl"](), params()
    saved = train(tx, p, tx.init(p), 0, 4)
    save(tmp_path / "saved", saved)
    lost = train(tx, *saved, 4, 7)
    resumed = train(tx, *restore(tmp_path / "saved", saved), 4, 7)
    chex.assert_trees_all_equal(resumed, lost)


if __name__ == "__main__":
    method, source, target = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    tx = METHODS[method]()
    start = jax.eval_shape(lambda p: (p, tx.init(p)), params())
    with ocp.StandardCheckpointer() as checkpointer:
        p, state = checkpointer.restore(source, start)
    save(target, train(tx, p, state, 5, 12))
