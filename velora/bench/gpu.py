"""`velora-bench gpu`: all that needs a GPU, in one command under ten minutes; each part appends a record to a file of its own.

Nothing that goes wrong in one item keeps the others from running: what was not run is named, with the reason, at once and in
the end. An item that has not begun when the time is up is not run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from velora.bench.machine import machine
from velora.errors import ConfigError
from velora.run.environment import git_state, versions
from velora.run.files import why, write_whole

if TYPE_CHECKING:
    import torch

DTYPE = "bfloat16"


@dataclass
class Job:
    """The device, the time that is left, and what could not be run."""

    device: torch.device
    tiny: bool = False
    seconds: float = 540.0
    clock: Callable[[], float] = time.monotonic
    not_run: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._end = self.clock() + self.seconds

    @property
    def seconds_left(self) -> float:
        return self._end - self.clock()

    def skip(self, item: str, reason: str) -> None:
        self.not_run[item] = " ".join(reason.split())
        print(f"not run: {item}: {self.not_run[item]}", flush=True)

    @contextmanager
    def trying(self, item: str) -> Iterator[None]:
        """What the item raises is the reason why it was not run; Ctrl-C is let through."""
        import torch

        from velora.run.shapes import forget

        try:
            yield
        except torch.OutOfMemoryError as error:
            self.skip(item, f"out of memory ({str(error).partition('. ')[0]})")
        except Exception as error:
            self.skip(item, f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}")
        forget(self.device)

    def has_time_for(self, item: str) -> bool:
        if self.seconds_left > 0:
            return True
        self.skip(item, "the time was up; give more with --minutes")
        return False


def run_gpu(job: Job, parts: list[str], out: Path) -> int:
    """Run the parts, append their records below `out`, and say what was not run. The exit status: 1 if a test failed or
    nothing could be run."""
    about = machine(job.device)
    print(f"{about['device']}, torch {about['torch']}; {job.seconds / 60:.0f} minutes", flush=True)
    ran, failed = 0, False
    for part in parts:
        print(f"\n{part}", flush=True)
        before = dict(job.not_run)
        start = time.monotonic()
        with job.trying(part):
            results = PARTS[part](job)
            new = {item: reason for item, reason in job.not_run.items() if item not in before}
            record = {
                "part": part, "machine": about, "seconds": time.monotonic() - start, "results": results, "not_run": new,
                "versions": versions(), "git": git_state(), "command": " ".join(["velora-bench", *sys.argv[1:]]),
            }  # fmt: skip
            append(out / f"{part}.json", record)
            ran += bool(results)
            failed |= any(result.get("failed") for result in results)
    print(f"\nrecords: {out}" if ran else "\nnothing could be run")
    for item, reason in job.not_run.items():
        print(f"not run: {item}: {reason}")
    return int(failed or not ran)


def append(file: Path, record: dict[str, Any]) -> None:
    """Add a record to the list in a JSON file."""
    write_whole(file, json.dumps([*earlier(file), record], indent=2) + "\n")


def earlier(file: Path) -> list[Any]:
    """The records that a file has; ConfigError where it is something else or its folder cannot be made."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        found = json.loads(file.read_text()) if file.exists() else []
    except (OSError, ValueError) as error:
        reason = why(error) if isinstance(error, OSError) else "it is no JSON"
        raise ConfigError(
            f"--out {file.parent}: {file.name} cannot be continued ({reason}); name another folder"
        ) from None
    if not isinstance(found, list):
        raise ConfigError(f"--out {file.parent}: {file.name} is no list of records; name another folder")
    return found


def _tests(job: Job) -> list[dict[str, Any]]:
    """The test suite's part for GPUs."""
    root = Path(__file__).parents[2]
    if job.device.type != "cuda":
        job.skip("tests", "tests marked gpu need a CUDA device")
    elif not (root / "tests").is_dir():
        job.skip("tests", "an installed package has no tests; run this from a checkout")
    elif job.has_time_for("tests"):
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=max(job.seconds_left, 1))
        print(done.stdout[-3000:], done.stderr[-1000:], flush=True)
        last = (done.stdout.strip().splitlines() or ["nothing was printed"])[-1]
        return [{"summary": last, "failed": done.returncode != 0}]
    return []


def _operator(job: Job) -> list[dict[str, Any]]:
    from velora.bench.convolution import CONVOLUTIONS
    from velora.bench.operator import SHAPES, operator

    shapes = [(16, 12, 8, 3)] if job.tiny else list(SHAPES)
    sizes = [(2, 16, 6, 8, 4)] if job.tiny else list(CONVOLUTIONS)
    if not job.has_time_for("operator"):
        return []
    return [operator(shapes, sizes, device_name=str(job.device), dtype_name=DTYPE, repeats=20, threads=None)]


def _step(job: Job) -> list[dict[str, Any]]:
    from velora.bench.step import DEFAULT_MODELS, POINTS, Wishes, compare_points, table

    points = ["velora_all"] if job.tiny else list(POINTS)
    found = []
    for model in ("llama_tiny",) if job.tiny else DEFAULT_MODELS:
        if job.has_time_for(f"step {model}"):
            with job.trying(f"step {model}"):
                found.append(compare_points(model, points, Wishes(job.device, DTYPE)))
                print(table(found[-1]), flush=True)
                job.not_run |= {f"step {model} {name}": reason for name, reason in found[-1]["left_out"].items()}
    return found


def _table7(job: Job) -> list[dict[str, Any]]:
    from velora.bench.table7 import rows, run_row, text

    found = []
    for row in rows(job.tiny):
        item = "table7 " + " ".join(override for override in row if "architecture" not in override)
        if job.has_time_for(item):
            with job.trying(item):
                found.append(run_row(row, job.device, num_steps=2 if job.tiny else 20))
                print(text(found[-1]), flush=True)
    return found


def _estimate(job: Job) -> list[dict[str, Any]]:
    from velora.bench.peaks import compare_peaks, make_workspaces, settings, summary

    make_workspaces(job.device)
    found = []
    for setting in settings(job.tiny):
        item = "estimate " + " ".join(setting)
        if job.has_time_for(item):
            with job.trying(item):
                row = compare_peaks(setting, job.device)
                found.append(row)
                print(
                    f"{row['relative_error']:+7.1%}  estimated {row['estimated_bytes'] / 2**20:9,.1f} MiB, "
                    f"measured {row['measured_bytes'] / 2**20:9,.1f} MiB  {' '.join(setting)}", flush=True,
                )  # fmt: skip
    if found:
        print(summary(found))
    return found


PARTS: dict[str, Callable[[Job], list[dict[str, Any]]]] = {
    "tests": _tests, "operator": _operator, "step": _step, "table7": _table7, "estimate": _estimate,
}  # fmt: skip
