"""The rows of the paper's Table 7 on this machine, with random weights: iterations per second and peak memory.

A row is its experiment, `conf/experiment/memory/table7_*`, which also has what the paper prints. The paper's rows are at batch
1 on a device that it does not name, so speeds compare within a column only. One row of ours stands beside them.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from velora.bench.machine import synchronise

if TYPE_CHECKING:
    import torch

    from velora.config.run import Config

Row = tuple[str, ...]
WARM_UP = 3
COLUMNS = (
    ("table7_c4", "llama_60m"),
    ("table7_c4", "llama_130m"),
    ("table7_alpaca", "llama_7b"),
    ("table7_alpaca", "llama_13b"),
)
OURS: Row = ("activations.layers=[all]", "recompute=lean")
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
            yield (f"experiment=memory/{table}/{row}", f"model={model}", *groups)
        yield (f"experiment=memory/{table}/velora", f"model={model}", *small, *OURS)


def run_row(row: Row, device: torch.device, num_steps: int = 20) -> dict[str, Any]:
    """Whole training steps, optimiser included. The network is built where it trains: a 7B takes minutes on a CPU."""
    import torch

    from velora.bench.step import random_batch
    from velora.config.compose import compose
    from velora.memory.meter import network_without_weights, training_loss, training_steps

    config = compose(*row, f"trainer.device={device.type}")
    on_cuda = device.type == "cuda"
    with torch.device(device):
        network = network_without_weights(config).to(device).train()
    batch = random_batch(config, network)
    config.activations.calibrate(network, batch)
    optimizer = config.optimizer.build(network, config)

    def steps(number: int) -> None:
        training_steps(
            network, [training_loss(network, batch, config)], optimizer, num_steps=number,
            max_grad_norm=config.trainer.max_grad_norm, after_step=config.activations.after_step,
        )  # fmt: skip

    steps(WARM_UP)
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    synchronise(device)
    start = time.perf_counter()
    steps(num_steps)
    synchronise(device)
    seconds = time.perf_counter() - start
    return {
        "overrides": list(row),
        "model": config.model.name,
        "steps_per_second": num_steps / seconds,
        "num_steps": num_steps,
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(device) if on_cuda else None,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device) if on_cuda else None,
        "paper": _printed(config, row),
    }


def forget(device: torch.device) -> None:
    """Give back what a row has left, so that the next one finds all of the device."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def text(found: dict[str, Any]) -> str:
    """One line of the table."""
    peak, printed, overrides = found["peak_allocated_bytes"], found["paper"], found["overrides"]
    name = " ".join([*overrides[:2], *(OURS if set(OURS) <= set(overrides) else ())])
    memory = "-" if peak is None else f"{peak / 1e9:.2f} GB"
    paper = f" (paper: {printed['steps_per_second']} it/s, {printed['memory_gb']} GB)" if printed else ""
    return f"{name}: {found['steps_per_second']:.2f} it/s, {memory}{paper}"


def _printed(config: Config, row: Row) -> dict[str, float]:
    """The paper's figures of this row; none for ours and for tiny networks."""
    if config.experiment is None or set(OURS) <= set(row) or set(TINY) <= set(row):
        return {}
    return dict(config.experiment.paper.get(f"{config.task.name} {config.model.name}", {}))
