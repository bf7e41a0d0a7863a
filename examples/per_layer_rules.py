"""A small transformer in which every kind of layer is pruned in its own way.

2:4 attention, MLPs with one weight in ten, half of the heads of the first block, embeddings
untouched: said once, by path, and printed before and after training.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import jaxprune as jp

WIDTH, HEADS, BLOCKS, LETTERS, LENGTH = 64, 4, 2, 16, 24
HEAD = WIDTH // HEADS


def init(key):
    keys = iter(jax.random.split(key, 8 * BLOCKS + 3))

    def dense(rows, columns):
        return {"kernel": jax.random.normal(next(keys), (rows, columns)) / rows**0.5}

    def block():
        return {
            "attention": {
                **{name: dense(WIDTH, WIDTH) for name in ("query", "key", "value", "out")},
            },
            "mlp": {"up": dense(WIDTH, 4 * WIDTH), "down": dense(4 * WIDTH, WIDTH)},
        }

    return {
        "embed": {"embedding": 0.3 * jax.random.normal(next(keys), (LETTERS, WIDTH))},
        "position": {"embedding": 0.3 * jax.random.normal(next(keys), (LENGTH, WIDTH))},
        **{f"block_{i}": block() for i in range(BLOCKS)},
        "head": dense(WIDTH, LETTERS),
    }


def norm(x):
    return x / jnp.sqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)


def attend(p, x):
    def heads(name):
        return (x @ p[name]["kernel"]).reshape(*x.shape[:-1], HEADS, HEAD)

    weights = jnp.einsum("bqhd,bkhd->bhqk", heads("query"), heads("key")) / HEAD**0.5
    seen = jnp.tril(jnp.ones(weights.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(seen, weights, -1e9))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, heads("value")).reshape(x.shape)
    return mixed @ p["out"]["kernel"]


def logits(params, letters):
    x = params["embed"]["embedding"][letters] + params["position"]["embedding"]
    for i in range(BLOCKS):
        p = params[f"block_{i}"]
        x = x + attend(p["attention"], norm(x))
        x = x + jax.nn.relu(norm(x) @ p["mlp"]["up"]["kernel"]) @ p["mlp"]["down"]["kernel"]
    return norm(x) @ params["head"]["kernel"]


def batch(key, size=64):
    """Sequences that repeat themselves: the second half can be read off the first."""
    half = jax.random.randint(key, (size, LENGTH // 2), 0, LETTERS)
    return jnp.concatenate([half, half], 1)


def losses(params, letters):
    """Cross entropy where the next letter follows from the first half."""
    each = optax.softmax_cross_entropy_with_integer_labels(
        logits(params, letters)[:, :-1], letters[:, 1:]
    )
    return each[:, LENGTH // 2 - 1 :]


def accuracy(params, letters):
    hits = jnp.argmax(logits(params, letters)[:, :-1], -1) == letters[:, 1:]
    return float(hits[:, LENGTH // 2 - 1 :].mean())


def rules():
    """Who gets what. First match wins."""

    def whole_heads(axes):
        return lambda scores, keep: jp.mask_groups(scores, keep, axes=axes, size=HEAD)

    allocate = jp.allocate_by_path({"attention": 0.5, "mlp": 0.9, "head/": None})
    # A head is HEAD columns of query, key and value, and HEAD rows of out.
    mask = jp.mask_by_path(
        {
            "block_0/attention/out": whole_heads(1),
            "block_0/attention": whole_heads(0),
            "attention": jp.gradual_n_m(2, 4, axis=0),
        }
    )
    return {"allocate": allocate, "mask": mask, "saliency": head_scores}


def head_scores(params, grads=None, *, key=None):
    """Magnitudes; in block 0 those of a head are shared by its four kernels."""
    scores = jp.magnitude(params, grads, key=key)
    block = scores["block_0"]["attention"]
    columns = [
        block[name]["kernel"].reshape(WIDTH, HEADS, HEAD) for name in ("query", "key", "value")
    ]
    rows = block["out"]["kernel"].reshape(HEADS, HEAD, WIDTH)
    heads = sum(c.mean((0, 2)) for c in columns) + rows.mean((1, 2))
    line = jnp.repeat(heads, HEAD)
    shared = {name: {"kernel": jnp.broadcast_to(line, (WIDTH, WIDTH))} for name in block}
    shared["out"] = {"kernel": jnp.broadcast_to(line[:, None], (WIDTH, WIDTH))}
    return {**scores, "block_0": {**scores["block_0"], "attention": shared}}


def main(argv=None):
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, default=1500, help="updates of training")
    options.add_argument("--sparsity", type=float, default=0.9, help="where the schedule ends")
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args(argv)
    key = jax.random.key(args.seed)
    params = init(key)

    print(jp.explain(params, args.sparsity, **rules()), "\n")

    begin, end = args.steps // 3, 2 * args.steps // 3
    tx = jp.prune_gradually(
        optax.adam(optax.cosine_decay_schedule(3e-3, args.steps)),
        jp.cubic_sparsity(args.sparsity, end - begin, begin=begin),
        when=jp.every(max(1, args.steps // 60), begin=begin, end=end),
        **rules(),
    )
    state = tx.init(params)

    @jax.jit
    def step(params, state, t):
        letters = batch(jax.random.fold_in(key, t))
        loss, grads = jax.value_and_grad(lambda p: losses(p, letters).mean())(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    with tqdm(range(args.steps), desc="training") as bar:
        for t in bar:
            params, state, loss = step(params, state, t)
            if t % 50 == 0 or t == args.steps - 1:
                bar.set_postfix(loss=f"{loss:.3f}")

    print(jp.summarize(params, state), "\n")
    block = params["block_1"]["attention"]["query"]["kernel"].reshape(-1, 4, WIDTH)
    print("most nonzero weights of any 4 in block_1:", int(np.max(np.count_nonzero(block, 1))))
    query = params["block_0"]["attention"]["query"]["kernel"].reshape(WIDTH, HEADS, HEAD)
    print("heads left in block_0:", np.flatnonzero(np.any(query, (0, 2))).tolist(), "of", HEADS)
    test = batch(jax.random.fold_in(key, args.steps), 256)
    print(f"letters recalled: {accuracy(params, test):.2%}")


if __name__ == "__main__":
    main()
