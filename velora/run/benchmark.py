"""A task's benchmark on the network of a run: at the end, between epochs, or alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from velora.config.parts import TaskData
from velora.config.run import Config
from velora.eval.questions import flat_scores
from velora.memory.meter import autocast_dtype
from velora.run.record import Run

__all__ = ["flat_scores", "judge"]


def judge(
    config: Config, run: Run, data: TaskData, network: nn.Module | None, step: int, *, epoch: float | None = None,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:  # fmt: skip
    """The scores of `data.benchmark` on the network after `step` optimiser steps; {} where the task has none.

    The answers go to the run's folder, the scores to a line of metrics.jsonl. `check` is called after each batch and may
    raise, to stop. The network is in evaluation mode meanwhile and stays on its device.
    """
    if data.benchmark is None or network is None:
        return {}
    found: dict[str, Any] = data.benchmark.evaluate(
        network, run.answers_file(step), batch_size=config.trainer.eval_batch_size, dtype=autocast_dtype(config),
        writes=run.writes, check=check,
    )  # fmt: skip
    phase = data.phases[-1].name if data.phases else "evaluation"
    run.log({"phase": phase, "step": step, "epoch": epoch, **flat_scores(found)})
    return found
