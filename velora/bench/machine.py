"""What every benchmark shares: candidates timed in turn, and what the times belong to.

The candidates run A B C A B C ..., so that whatever else the machine does meets all of them alike; what is reported is the
median over the rounds, its quartiles, and ratios of medians.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import quantiles
from typing import TYPE_CHECKING, Any

from velora.errors import ConfigError

if TYPE_CHECKING:
    import torch

WARM_UP = 3
Step = Callable[[], object]


def device_called(name: str, threads: int | None = None) -> torch.device:
    """The device of `--device`; ConfigError for one that is not here. `threads`: of the CPU, None for all."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise ConfigError(f"--device {name} is not available here ({reason})") from None


def in_turn(
    candidates: Mapping[str, Step],
    repeats: int,
    device: torch.device,
    *,
    warm_up: int = WARM_UP,
    tidy: Callable[[str], object] = lambda _name: None,
    on_round: Callable[[int], object] = lambda _round: None,
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round after the warm-up; `tidy(name)` follows each of them, untimed."""
    from velora.run.device import synchronise

    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(warm_up + repeats):
        on_round(round_)
        for name, step in candidates.items():
            synchronise(device)
            start = time.perf_counter()
            step()
            synchronise(device)
            if round_ >= warm_up:
                times[name].append(time.perf_counter() - start)
            tidy(name)
    return times


def quartiles(values: list[float]) -> list[float]:
    """The first and the third."""
    return quantiles(values, n=4)[::2] if len(values) > 1 else [values[0]] * 2


def machine(device: torch.device) -> dict[str, Any]:
    """What the times belong to; `load_average` of the minute before tells whether the machine was otherwise idle."""
    import torch

    name = _processor() if device.type == "cpu" else torch.cuda.get_device_name(device)
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "load_average": load_average(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def load_average() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
