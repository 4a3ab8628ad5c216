"""Shared by all tests: the real data beside the repository, and the command line as a user's process runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
SHARED_DATA = REPOSITORY.parent / "shared" / "data"

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny networks; the cores are used by several test processes


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data samples; skips where the checkout stands alone."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the real data samples (../shared/data) are not beside this checkout")
    return SHARED_DATA


SLOW_FILES = (
    "test_run", "test_kills", "test_sweep_kills", "test_train", "test_train_loss", "test_train_resume", "test_train_divergence",
    "test_memory_cli", "test_distributed",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that no process is left with one of them at the end."""
    items.sort(key=lambda item: item.path.stem not in SLOW_FILES)


class Cli:
    """Runs a console script in a folder of its own and keeps what it said."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def command(self, *overrides: str, program: str = "velora-train") -> list[str]:
        return [str(Path(sys.executable).parent / program), *overrides]

    def __call__(
        self, *overrides: str, program: str = "velora-train", timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
        return subprocess.run(
            self.command(*overrides, program=program),
            cwd=self.folder, capture_output=True, text=True, timeout=timeout, env=environment,
        )  # fmt: skip

    def record(self, name: str, seed: int = 0) -> dict:
        return json.loads((self.folder / "runs" / name / f"seed{seed}" / "result.json").read_text())


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return Cli(tmp_path)
