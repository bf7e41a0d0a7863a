"""Interleaved timing, and results as a table, JSON and pictures."""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

_LARGE = "glibc.malloc.hugetlb=1"


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0].split(":")[1].strip() if names else model
    return {
        "device": jax.devices()[0].device_kind,
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
        "large pages": _LARGE in os.environ.get("GLIBC_TUNABLES", ""),
    }


def with_large_pages() -> None:
    """Start anew with a malloc that asks for large pages, unless ``GLIBC_TUNABLES`` is set.

    NumPy asks Linux for them itself; malloc, and with it XLA, only if it is told to.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        command = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, command, os.environ | {"GLIBC_TUNABLES": _LARGE})


def interleaved(
    calls: Mapping[Hashable, Callable[[], Any]],
    repeats: int,
    label: str = "",
    before: Callable[[], Any] = lambda: None,
) -> dict[Hashable, list[float]]:
    """Seconds of every call, in turns, after one warm-up each; ``before`` every turn, untimed.

    Turns run forwards and backwards alternately, so that no call always follows the same one.
    """
    before()
    for call in calls.values():
        jax.block_until_ready(call())
    seconds: dict[Hashable, list[float]] = {name: [] for name in calls}
    for turn in tqdm(range(repeats), desc=label, leave=False):
        before()
        for name in list(calls)[:: 1 if turn % 2 == 0 else -1]:
            start = time.perf_counter()
            jax.block_until_ready(calls[name]())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of the ratios turn by turn, which slow drifts of the machine leave alone."""
    return float(np.median(np.divide(ours, theirs)))


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation."""
    deviation = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{deviation}"


def table(rows: Sequence[Sequence[Any]]) -> str:
    """Rows, the first of them the head, as a Markdown table."""
    head, *body = [[str(cell) for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body)]
    return "\n".join(lines)


def save(name: str, results: Mapping[str, Any], out: Path) -> None:
    """Write results and machine as JSON."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **results}, indent=1))
    print(f"\n{machine()}\nwritten: {path}")


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    options = argparse.ArgumentParser(description=doc)
    options.add_argument("--out", type=Path, default=Path("out"), help="where results go")
    options.add_argument("--quick", action="store_true", help="small sizes, few repeats")
    return options
