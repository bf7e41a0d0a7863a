import os
from collections import Counter

# Hundreds of small programs run for milliseconds: what costs is compiling them.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import hypothesis
import jax
import pytest

LONG = ("test_examples.py", "test_sequential.py")  # of few tests

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("ours", deadline=None, derandomize=True, max_examples=30)
hypothesis.settings.load_profile("ours")


@pytest.fixture(autouse=True)
def strict_dtypes(request):
    """Implicit dtype promotion raises, but in modules that run optimizers which rely on it."""
    with jax.numpy_dtype_promotion(getattr(request.module, "DTYPE_PROMOTION", "strict")):
        yield


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="every row of every sweep")


def pytest_collection_modifyitems(config, items):
    """Of a sweep that takes minutes the usual rows: those that ``usual`` names a part of.

    Modules that take long come first, or one worker ends alone with the last of them.
    """

    def runs(item):
        usual = item.get_closest_marker("usual")
        return usual is None or any(row in item.callspec.id for row in usual.args)

    if not config.getoption("full"):
        config.hook.pytest_deselected(items=[item for item in items if not runs(item)])
        items[:] = filter(runs, items)
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.name not in LONG, -tests[item.path], item.path))


def pytest_generate_tests(metafunc):
    if "optimizer" in metafunc.fixturenames:
        from cases import REGROWING, pairs

        swept = pairs(metafunc.config.getoption("full"))
        if "regrower" in metafunc.fixturenames:
            swept = [(method, optimizer) for method, optimizer in swept if method in REGROWING]
            metafunc.parametrize(("regrower", "optimizer"), swept)
        else:
            metafunc.parametrize(("method", "optimizer"), swept)
