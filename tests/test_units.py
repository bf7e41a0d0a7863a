"""Scores of slices and blocks: sums of many entries, the same bits however these are sharded."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_sharding import collectives, mesh

import jaxprune as jp
from jaxprune import _loops
from jaxprune.structures.units import Units

# Shapes and tiles: factors that divide no number of shards, lines of the last axis, whole leaves.
UNITS = (
    ((2432, 96), (2432, 1)),
    ((2432, 96), (1, 96)),
    ((96, 2048), (1, 2048)),
    ((96, 2048), (96, 2048)),
    ((96, 2048), (32, 64)),
    ((2374, 6), (2374, 2)),
    ((1189, 33), (1, 33)),
    ((3, 3, 256, 20), (3, 3, 256, 1)),
    ((128, 12, 64), (128, 1, 64)),
    ((100, 70), (7, 32)),
)


def units_of(leaf, tile):
    """The entries of each unit, in a list."""
    starts = np.ndindex(*(-(-n // t) for n, t in zip(leaf.shape, tile, strict=True)))
    edges = (
        tuple(slice(i * t, (i + 1) * t) for i, t in zip(at, tile, strict=True)) for at in starts
    )
    return [leaf[edge] for edge in edges]


@pytest.fixture(params=[1, 8])
def devices(request, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: request.param)
    jax.clear_caches()
    yield request.param
    jax.clear_caches()


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("how", ["sum", "mean", "max"])
@pytest.mark.parametrize(("shape", "tile"), UNITS)
def test_scores_of_units(shape, tile, how):
    leaf = np.random.default_rng(0).integers(-9, 9, shape).astype(np.float32)
    found = jax.jit(partial(Units(shape, tile).score, how=how))(leaf).ravel()
    want = [getattr(np, how)(unit.astype(np.float64)) for unit in units_of(leaf, tile)]
    np.testing.assert_array_equal(found, np.float32(want))


@pytest.mark.parametrize(("shape", "tile"), UNITS)
def test_what_is_not_finite_stays_in_its_unit(shape, tile):
    leaf = np.random.default_rng(0).random(shape, np.float32)
    leaf.flat[[0, -1]] = np.inf, np.nan
    found = jax.jit(partial(Units(shape, tile).score, how="sum"))(leaf).ravel()
    want = np.array([unit.sum() for unit in units_of(leaf, tile)])
    np.testing.assert_array_equal(np.isnan(found), np.isnan(want))
    np.testing.assert_array_equal(np.isinf(found), np.isinf(want))


@pytest.mark.parametrize(("shape", "tile"), UNITS)
def test_scores_have_the_bits_of_one_device(shape, tile, monkeypatch):
    leaf = np.random.default_rng(0).lognormal(sigma=3, size=shape).astype(np.float32)
    unit_scores = partial(Units(shape, tile).score, how="sum")
    many = jax.jit(unit_scores)(leaf)
    where = mesh(AxisType.Auto)
    for spec, axis, shards in ((P("x"), 0, 4), (P(None, "y"), 1, 2), (P(("x", "y")), 0, 8)):
        if shape[axis] % shards == 0:
            placed = jax.device_put(leaf, NamedSharding(where, spec))
            np.testing.assert_array_equal(jax.jit(unit_scores)(placed), many)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    jax.clear_caches()
    np.testing.assert_array_equal(jax.jit(unit_scores)(leaf), many)
    jax.clear_caches()
    exact = [unit.astype(np.float64).sum() for unit in units_of(leaf, tile)]
    np.testing.assert_allclose(many.ravel(), exact, rtol=1e-6)


@pytest.mark.parametrize("known", [1 / 3, 2.5, 3, 41, 2**33])
def test_known_divisors_divide_as_numpy_does(known):
    """Also zeros, NaN and infinities, alone, in an array and under vmap."""
    x = np.random.default_rng(0).lognormal(size=(3, 999)).astype(np.float32)
    x[:, :5] = 0, -0.0, np.nan, np.inf, -np.inf
    divide, want = partial(_loops.divide, known=known), x / np.float32(known)
    for f in (divide, jax.jit(divide), jax.jit(jax.vmap(divide))):
        np.testing.assert_array_equal(f(jnp.asarray(x)), want)
    each = jax.jit(jax.vmap(divide))(jnp.asarray(x[:, 9]))
    np.testing.assert_array_equal(each, want[:, 9])


def test_a_mean_is_divided_under_vmap_too():
    """41 times a rounded 1/41 is less than 1: a block of 41 ones would come after one of 1."""
    mask = partial(jp.mask_blocks, block=(1, 41), axes=(0, 1))
    masks = jax.jit(jax.vmap(lambda s: mask({"w": s}, {"w": 41})["w"]))(jnp.ones((3, 1, 42)))
    np.testing.assert_array_equal(masks, np.broadcast_to(np.arange(42) < 41, masks.shape))


@pytest.mark.parametrize("rows", [3, 64, 130, 2432, 4096])
@pytest.mark.parametrize("axis", [0, 1])
def test_small_slices_beside_a_large_one_are_told_apart(rows, axis):
    leaf = np.ones((rows, 4), np.float32) * np.float32([1e-20, 3e-20, 2e-20, 1])
    mask = jp.mask_groups({"w": leaf if axis == 0 else leaf.T}, {"w": 2 * rows}, axes=axis)["w"]
    np.testing.assert_array_equal(np.any(mask, axis), [False, True, False, True])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((151_936, 4096), P("x", "y")),
        ((50_304, 768), P("x", "y")),
        ((4096, 16_384), P("x")),
        ((4096, 16_384), P(None, ("x", "y"))),
        ((3, 3, 512, 1024), P(None, None, "x", "y")),
    ],
)
def test_shards_send_numbers_of_slices_and_no_weights(kind, shape, spec):
    """Compiled, not run: of every slice the largest entry and its digits, and no more."""
    where = mesh(kind)
    with jax.sharding.set_mesh(where):
        leaf = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(where, spec))
        for axes in (0, -1, tuple(range(len(shape) - 1))):
            mask = jax.jit(lambda s, axes=axes: jp.mask_groups({"w": s}, {"w": 9999}, axes=axes))
            over = (axes,) if isinstance(axes, int) else axes
            slices = np.prod(shape) // np.prod([shape[axis] for axis in over])
            sent = collectives(mask.lower(leaf).compile().as_text())
            assert all(name == "all-reduce" and size <= 12 * slices for name, size in sent), sent


@pytest.mark.parametrize("least", [1, 64])
@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((1187 * 4, 64), (0,)),
        ((4637, 128), (0, 1)),
        ((17, 3), (0,)),
        ((2, 19 * 64), (0, 1)),
        ((23 * 29, 5), (0,)),
        ((96, 640), (0, 1)),
    ],
)
def test_folds_of_lines_that_no_small_number_divides(shape, axes, least):
    x = np.random.default_rng(0).integers(-9, 9, shape).astype(np.float32)
    fold = partial(_loops.fold, x=jnp.asarray(x), axes=axes, least=dict.fromkeys(axes, least))
    added, largest = np.asarray(fold(jnp.add)), np.asarray(fold(jnp.maximum))
    np.testing.assert_array_equal(added.sum(axes), x.sum(axes))
    np.testing.assert_array_equal(largest.max(axes), x.max(axes))
    for axis in axes:
        line = _loops.LINE if axis == x.ndim - 1 else 1
        if least > 1 and x.shape[axis] % line == 0:
            lines = x.shape[axis] // line
            assert added.shape[axis] >= min(lines, least) * line
            assert added.shape[axis] // line % np.gcd(lines, least) == 0


@pytest.mark.parametrize("shape", [(151_936, 4096), (46_337, 46_339)])
def test_lamp_of_a_vocabulary(shape):
    """Rows that 1,187 divides, or nothing: too many digits to add, were they not folded."""
    scores = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
    jax.eval_shape(partial(jp.allocate_lamp, sparsity=0.9), scores)
