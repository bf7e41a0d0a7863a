"""The examples run, at small size, as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

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
def test_help(name):
    assert "--seed" in example(name, "--help")
