"""Two processes on one machine agree on every mask, and with one device given the scores."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def test_two_processes_agree():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    here = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": str(here.parent), "JAX_PLATFORMS": "cpu"}
    workers = [
        subprocess.Popen(
            [sys.executable, here / "two_processes.py", address, str(i)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for i in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=240) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, (out, err) in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, err
        assert out.splitlines()[-1] == "kept 128", out  # 20 % of 640
