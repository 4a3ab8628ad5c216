"""A worker of the tests in two gloo processes, as torchrun would start them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


def run_in_two_processes(worker: str, folder: Path, *, timeout: float = 300, **environment: str) -> None:
    """Run `tests/<worker> <folder>` in both, and wait; a process that fails shows the end of its errors."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment}
    processes = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / worker), str(folder)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in processes:
        error = process.communicate(timeout=timeout)[1]
        assert process.returncode == 0, error[-3000:]
