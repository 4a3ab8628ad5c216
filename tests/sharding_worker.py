"""One process of two, as torchrun starts it: the runs of <folder>/runs.json, one after the other, into <folder>/two/.

A run with `kill_at` is stopped before that step, on both processes, and started again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch


class Killed(BaseException):
    """Ends a run as a kill would: nothing of ours catches it."""


def run(folder: Path, overrides: list[str], kill_at: int | None) -> None:
    from loop_helpers import config_of, train

    from velora.run.train import PhaseTrainer

    config = config_of(folder, *overrides)
    if kill_at is not None:
        original = PhaseTrainer.training_step

        def until(self: PhaseTrainer, *args: object, **kwargs: object) -> torch.Tensor:
            if self.state.global_step == kill_at:
                raise Killed
            return original(self, *args, **kwargs)

        PhaseTrainer.training_step = until
        try:
            train(config)
        except Killed:
            config = config_of(folder, *overrides, "resume=required")
        finally:
            PhaseTrainer.training_step = original
    train(config)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    for name, (overrides, kill_at) in json.loads((root / "runs.json").read_text()).items():
        run(root / "two" / name, overrides, kill_at)
