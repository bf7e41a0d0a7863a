"""One of two processes that train one model; run by test_processes.py."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp


def main(address, process):
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=process)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"first": P("data", None), "second": P(None, "data")}
    rng = np.random.default_rng(0)

    def spread(tree):
        return {
            name: {
                "kernel": jax.make_array_from_callback(
                    leaf.shape, NamedSharding(mesh, specs[name]), lambda i, leaf=leaf: leaf[i]
                )
            }
            for name, leaf in tree.items()
        }

    shapes = {"first": (32, 16), "second": (16, 8)}
    params = spread({n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()})
    x = jnp.asarray(rng.normal(size=(64, 32)).astype(np.float32))

    def loss(p):
        return jnp.mean(jnp.square(jnp.tanh(x @ p["first"]["kernel"]) @ p["second"]["kernel"]))

    tx = jp.prune_gradually(
        optax.sgd(0.1, momentum=0.9),
        jp.cubic_sparsity(0.8, 6),
        when=jp.every(2, end=6),
        allocate=jp.allocate_global,
    )

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    def gather(tree):
        return multihost_utils.process_allgather(tree, tiled=True)

    state = jax.jit(tx.init)(params)
    for t in range(8):
        scores, old = gather(params), gather(state.masks)
        params, state = step(params, state)
        masks = gather(state.masks)
        if t % 2 == 0 and t <= 6:
            # The same mask from the gathered scores, on this process's own first device.
            local = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            alone, before = jax.device_put((scores, old), local)
            alive = jax.tree.map(lambda s, m: jnp.where(m, jnp.abs(s), -jnp.inf), alone, before)
            wanted = jp.cubic_sparsity(0.8, 6)(t)
            keep = jp.allocate_global(alive, jax.device_put(np.float32(wanted), local))
            same = jp.mask_topk(alive, keep)
            jax.tree.map(np.testing.assert_array_equal, masks, jax.tree.map(np.asarray, same))
    multihost_utils.assert_equal(masks, "the processes disagree on a mask")
    print("kept", sum(int(m.sum()) for m in jax.tree.leaves(masks)))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
