"""Small leaves searched in one go: on one device flat and padded, whatever their shapes.

As on a GPU too, where larger leaves are small and counted by rows.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_topk import counted_as_numpy_does, oracle, scores

import jaxprune as jp
from jaxprune import _counting, _exact, _topk
from jaxprune._leaves import Leaves, any_nan

# Alone in a stack, of one size, padded a little and to many times their length.
SHAPES = ((64, 32), (7, 9), (32, 64), (3, 3, 8, 4), (50,), (1,), (64, 33), (13, 1))
KINDS = tuple(map(str, range(len(SHAPES))))
COSTS = (1, 3, 1, 2, 5, 1, 1, 7)


@pytest.fixture(autouse=True, scope="module", params=["cpu", "gpu"])
def one_device(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        patch.setattr(jax, "default_backend", lambda: request.param)
        if request.param == "gpu":  # what is lowered for one, lowered for a CPU
            patch.setattr(_counting, "by_backend", lambda f, *args: f(False, *args))
        jax.clear_caches()
        yield request.param
    jax.clear_caches()


def lengths(shapes, dtypes=jnp.float32, **options):
    dtypes = [dtypes] * len(shapes) if not isinstance(dtypes, list) else dtypes
    leaves = [jnp.zeros(s, d) for s, d in zip(shapes, dtypes, strict=True)]
    problem = Leaves(leaves, kinds=tuple(map(str, range(len(leaves)))), **options)
    assert sorted(problem.order) == list(range(len(leaves)))
    return [(stack.length, len(stack.members)) for stack in problem.stacks]


def test_what_is_stacked_with_what(one_device):
    block = [(64, 64)] * 4 + [(64, 256), (256, 64)]
    assert lengths([*block * 12, (64, 100)]) == [(16384, 73)]
    # Padded while few; from there on of one size.
    assert lengths([*[(256, 512)] * 24, *[(256, 256)] * 48]) == [(131072, 24), (65536, 48)]
    assert lengths([(300, 300), *[(4,)] * 50]) == [(90000, 2), (4, 49)]
    large = [(512, 512), (8,)], [(1024, 1025), (8,)]  # not copied
    for shapes in large if one_device == "cpu" else large[1:]:
        assert lengths(shapes) == [(None, 1), (8, 1)]
    assert lengths([(8,), (8,)], [jnp.float32, jnp.bfloat16]) == [(8, 1), (8, 1)]
    as_they_are = [(None, 1), (None, 1)]
    assert lengths([(8,), (4,)], jnp.float8_e4m3fn) == as_they_are  # may have no infinity
    assert lengths([(4, 2), (8,)], shaped=True) == as_they_are


@pytest.mark.parametrize("kind", ["normal", "ties", "special", "constant", "subnormal", "wide"])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_best_of_every_leaf(dtype, kind):
    leaves = [scores(shape, dtype, kind, i) for i, shape in enumerate(SHAPES)]
    rng = np.random.default_rng(0)
    for keep in (
        [0] * len(leaves),
        [leaf.size for leaf in leaves],
        *([int(rng.integers(0, leaf.size + 1)) for leaf in leaves] for _ in range(2)),
    ):
        found = _topk.top(leaves, keep, kinds=KINDS)
        assert found.bad == any(np.isnan(leaf.astype(jnp.float32)).any() for leaf in leaves)
        for leaf, k, mask in zip(leaves, keep, found.masks, strict=True):
            np.testing.assert_array_equal(mask, oracle(leaf, k))


@pytest.mark.parametrize("costs", [(1,) * len(SHAPES), COSTS])
@pytest.mark.parametrize("kind", ["normal", "ties", "special", "constant"])
def test_best_of_all_is_as_of_leaves_alone(kind, costs):
    dtypes = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float32] * 2
    leaves = [scores(s, d, kind, 5) for s, d in zip(SHAPES, dtypes, strict=True)]
    floors = (1, 0, 2, 0, 3, 1, 0, 0)
    search = partial(_topk.top_shared, leaves, costs=costs, floors=floors)
    for budget in (40, 1000, 4000):
        found, want = (search(_exact.constant(budget), kinds=kinds) for kinds in (KINDS, None))
        jax.tree.map(np.testing.assert_array_equal, found, want)


def test_what_is_kept_was_alive():
    leaves = [scores(shape, jnp.float32, "ties", i) for i, shape in enumerate(SHAPES)]
    rng = np.random.default_rng(0)
    alive = [jnp.asarray(rng.random(shape) < 0.6) for shape in SHAPES]
    lowest = [jnp.where(m, x, -jnp.inf) for x, m in zip(leaves, alive, strict=True)]
    leaves = [jnp.where(m, x, jnp.nan) for x, m in zip(leaves, alive, strict=True)]
    keep = [leaf.size // 2 for leaf in leaves]
    found = _topk.top(leaves, keep, kinds=KINDS, alive=alive)
    want = [oracle(x, k) & m for x, k, m in zip(lowest, keep, alive, strict=True)]
    jax.tree.map(np.testing.assert_array_equal, found.masks, want)
    assert not found.bad
    leaves[3] = jnp.where(alive[3], jnp.nan, leaves[3])
    found = _topk.top(leaves, keep, kinds=KINDS, alive=alive)
    jax.tree.map(np.testing.assert_array_equal, found.masks, alive)
    assert found.bad
    assert any_nan(leaves)


@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_many_leaves_are_added_strip_by_strip(kind, one_device):
    leaves = [scores((256, 256), jnp.float32, kind, i) for i in range(33)]
    assert not _counting.few(33 << 16, 33)
    strips = (1, 1, 8192) if one_device == "cpu" else None
    assert _counting.strips(jnp.zeros((33, 1 << 16)), (1,)) == strips
    keep = [1000 * i for i in range(33)]
    masks = jax.jit(lambda x: _topk.top(x, keep, kinds=tuple(range(33))).masks)(leaves)
    for leaf, k, mask in zip(leaves, keep, masks, strict=True):
        np.testing.assert_array_equal(mask, oracle(leaf, k))


@pytest.mark.parametrize(
    ("shape", "split", "again"),
    [
        ((1 << 21,), (0, 32, 8192), (0, 4, 1)),
        ((2048, 2048), (0, 64, 4), (0, 8, 1)),
        ((4, 8192, 129), (1, 32, 32), (1, 4, 1)),
        ((2048, 1030), (0, 64, 4), (0, 8, 1)),
    ],
)
def test_large_leaves_are_added_in_strips_twice(shape, split, again, one_device):
    axes = tuple(range(len(shape)))
    if one_device == "cpu":
        found = _counting.strips(jnp.zeros(shape), axes)
        assert found == split
        bytes_ = sum(found.of(jnp.zeros(shape, jnp.uint8)))
        assert _counting.strips(bytes_, (found.axis,)) == again
    counted_as_numpy_does(shape, axes)


@pytest.mark.parametrize("shape", [(1030, 1031), (2**21 + 2048,), (1024, 1026), (3,)])
def test_rows_of_leaves(shape):
    """Whole ones and not, ends among equal scores, and a count past 16 bits in each of two."""
    leaf = jnp.asarray(np.random.default_rng(0).integers(0, 3, (2, *shape)), jnp.float32)
    keys = _counting.order(jnp.array([1.0, 0.0]), jnp.uint32)
    ends = jnp.array([[7, 0], [leaf[0].size // 2, leaf[0].size]], jnp.uint32)
    cuts = _counting.Cut(jnp.broadcast_to(keys[:, None], (2, 2)), ends)
    index = np.arange(leaf[0].size).reshape(shape)
    want = [
        [
            np.sum((x > t) | ((x == t) & (index < end)))
            for x, end in zip(np.asarray(leaf), e, strict=True)
        ]
        for t, e in zip((1, 0), np.asarray(ends), strict=True)
    ]
    expand = [jax.tree.map(lambda x: x.reshape(2, 2, *[1] * len(shape)), cuts)]
    rows = jax.jit(partial(_counting.count_rows, grain=0))(leaf, *expand, jnp.int32(0))
    found = _counting.added_up([rows, rows[:1, :1], rows])
    np.testing.assert_array_equal(found[:, [0, 1, 3, 4]], np.tile(want, 2))


@pytest.mark.parametrize("allocate", [jp.allocate_uniform, jp.allocate_global, jp.allocate_lamp])
def test_training_ends_with_the_masks_of_eight_devices(monkeypatch, allocate):
    rng = np.random.default_rng(0)
    params = {
        f"layer{i}": {"kernel": jnp.asarray(rng.normal(size=s), jnp.float32)}
        for i, s in enumerate([(8, 16), (16, 16), (16, 40), (40, 3)])
    }
    grads = jax.tree.map(lambda p: 0.01 * p, params)

    def trained():
        jax.clear_caches()
        tx = jp.prune_gradually(
            optax.sgd(0.1), jp.cubic_sparsity(0.9, 20), when=jp.every(5), allocate=allocate
        )

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        (_, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=21))(
            (params, tx.init(params))
        )
        return state.masks

    found = trained()
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    jax.tree.map(np.testing.assert_array_equal, found, trained())
