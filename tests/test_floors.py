"""Imports point down only."""

import ast
from pathlib import Path

import jaxprune as jp

ROOT = Path(jp.__file__).parent
FLOORS = {
    "_typing": 0,
    "_tree": 0,
    "_checks": 0,
    "_loops": 0,
    "_paths": 0,
    "_table": 0,
    "_brackets": 0,
    "_counting": 0,
    "_placement": 0,
    "_sums": 0,
    "_exact": 0,
    "_leaves": 0,
    "_topk": 0,
    "_lamp": 0,
    "_jaxpr": 0,
    "_atoms": 0,
    "_couple_moves": 0,
    "_couple_sums": 0,
    "_scopes": 0,
    "_small": 0,
    "_trail": 0,
    "_walk": 0,
    "_rows": 0,
    "saliency": 1,
    "calibration": 1,
    "schedules": 1,
    "allocation": 2,
    "masks": 3,
    "structures": 3,
    "mixed": 4,
    "rules": 4,
    "oneshot": 4,
    "layerwise": 4,
    "channels": 4,
    "transforms": 4,
    "shrink": 5,
    "flops": 5,
    "report": 5,
    "plan": 5,
    "export": 5,
}


def room(module):
    return module.split(".")[1]


def test_every_import_points_down():
    for file in ROOT.rglob("*.py"):
        here = ".".join(("jaxprune", *file.relative_to(ROOT).with_suffix("").parts))
        if file.name == "__init__.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "jaxprune":
                targets = [f"jaxprune.{name.name}" for name in node.names]
            elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("jaxprune."):
                targets = [str(node.module)]
            else:
                continue
            for target in targets:
                above, below = FLOORS[room(here)], FLOORS[room(target)]
                private = room(target).startswith("_") and above == 0
                same_room = room(here) == room(target)
                structure = (room(here), room(target)) == ("structures", "masks")
                assert below < above or private or same_room or structure, (here, target)


def test_public_names_are_listed_sorted_and_documented():
    assert sorted(jp.__all__) == list(jp.__all__)
    for name in jp.__all__:
        assert getattr(jp, name).__doc__, name


def test_no_private_jax():
    for file in ROOT.rglob("*.py"):
        assert "jax._src" not in file.read_text(), file
