"""The rows of the paper's Table 7 on this machine, with random weights: iterations per second and peak memory.

A row is its experiment, `conf/experiment/table7_*`, which also has what the paper prints. The paper's rows are at batch
1 on a device that it does not name, so speeds compare within a column only. One row of ours stands beside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from velora.config.level import printed_for
from velora.run.shapes import NUM_STEPS, timed_steps

if TYPE_CHECKING:
    import torch

    from velora.config.run import Config

Row = tuple[str, ...]
COLUMNS = (
    ("table7_c4", "llama_60m"),
    ("table7_c4", "llama_130m"),
    ("table7_alpaca", "llama_7b"),
    ("table7_alpaca", "llama_13b"),
)
OURS = "velora_all_lean"
TINY: Row = (
    "task.max_length=16", "model.architecture.hidden_size=64", "model.architecture.intermediate_size=128",
    "model.architecture.num_hidden_layers=1", "model.architecture.num_attention_heads=4",
    "model.architecture.num_key_value_heads=4", "model.architecture.vocab_size=256",
)  # fmt: skip


def rows(tiny: bool = False) -> Iterator[Row]:
    """Overrides of one row each, the small networks first."""
    for table, model in COLUMNS:
        small = (*TINY, *(("activations.num_groups=16",) if table == "table7_c4" else ())) if tiny else ()
        for row in ("full", "checkpoint", "velora"):
            groups = small if row == "velora" else small[: len(TINY)]
            yield (f"experiment={table}/{row}", f"model={model}", *groups)
        groups = small[: len(TINY)]
        yield (f"experiment={table}/{OURS}", f"model={model}", *groups)


def run_row(row: Row, device: torch.device, num_steps: int = NUM_STEPS) -> dict[str, Any]:
    """Whole training steps of one row."""
    from velora.config.compose import compose

    config = compose(*row, f"trainer.device={device.type}")
    found = asdict(timed_steps(config, device, num_steps))
    return {"overrides": list(row), "model": config.model.name, **found, "paper": _printed(config, row)}


def text(found: dict[str, Any]) -> str:
    """One line of the table."""
    peak, printed, overrides = found["peak_allocated_bytes"], found["paper"], found["overrides"]
    name = " ".join(overrides[:2])
    memory = "-" if peak is None else f"{peak / 1e9:.2f} GB"
    paper = f" (paper: {printed['steps_per_second']} it/s, {printed['memory_gb']} GB)" if printed else ""
    return f"{name}: {found['steps_per_second']:.2f} it/s, {memory}{paper}"


def _printed(config: Config, row: Row) -> dict[str, float]:
    """The paper's figures of this row; none for tiny networks."""
    if config.experiment is None or set(TINY) <= set(row):
        return {}
    return dict(printed_for(config.experiment.paper, config.task.name, config.model.name))
