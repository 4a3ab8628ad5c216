"""A run at level `memory`: real shapes, random weights, no data. What it would use, and on a GPU what it uses and how fast it is.

Without a GPU the record has estimates for a CUDA device (velora/memory/estimate.py), and no speed. On one, `NUM_STEPS` whole
training steps run, optimiser included, and the allocator's peaks and the steps per second stand beside the estimates.
"""

from __future__ import annotations

import gc
import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from velora.config.run import Config
    from velora.run.run import Measured

WARM_UP = 3
NUM_STEPS = 20
ESTIMATED = "none: estimated for a CUDA device"


@dataclass(frozen=True)
class Steps:
    """Training steps on a device: their speed, and what CUDA's allocator reports (null on a CPU)."""

    steps_per_second: float
    num_steps: int
    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None


def measure_shapes(config: Config, measured: Measured) -> None:
    """Fill in what can be known here; ConfigError where a run of this configuration would raise it."""
    from velora.memory.explain import Questions, explain
    from velora.run.device import chosen_device, device_name

    found = explain(config, Questions(ledger=False))
    figures = found.figures.to_json()
    keys = ("weights_bytes", "gradients_bytes", "optimizer_bytes", "saved_for_backward_bytes")
    measured.memory.update({key: figures[key] for key in keys})
    measured.memory["peak_estimated_bytes"] = figures["peak_bytes"]
    measured.memory.update(found.sums)
    measured.device = ESTIMATED
    measured.parameters.update(found.parameters)
    device = chosen_device(config)
    if device.type == "cpu":
        return
    steps = asdict(timed_steps(config, device))
    measured.device = device_name(device)
    measured.speed["steps_per_second"] = steps["steps_per_second"]
    measured.memory.update({key: steps[key] for key in ("peak_allocated_bytes", "peak_reserved_bytes")})


def timed_steps(config: Config, device: torch.device, num_steps: int = NUM_STEPS) -> Steps:
    """Whole training steps on one batch. The network is built where it trains: a 7B takes minutes on a CPU."""
    import torch

    from velora.memory.meter import network_without_weights, random_batch, training_loss, training_steps
    from velora.run.device import synchronise

    on_cuda = device.type == "cuda"
    with torch.device(device):
        network = network_without_weights(config).to(device).train()
    batches = [random_batch(config, network) for _ in range(config.trainer.accumulation_steps)]
    config.activations.calibrate(network, batches)
    optimizer = config.optimizer.build(network, config)
    losses = [training_loss(network, batch, config) for batch in batches]

    def steps(number: int) -> None:
        training_steps(
            network, losses, optimizer, num_steps=number,
            max_grad_norm=config.trainer.max_grad_norm, after_step=partial(config.after_step, network, optimizer),
        )  # fmt: skip

    steps(WARM_UP)
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    synchronise(device)
    start = time.perf_counter()
    steps(num_steps)
    synchronise(device)
    seconds = time.perf_counter() - start
    peaks = (
        (torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)) if on_cuda else (None, None)
    )
    return Steps(num_steps / seconds, num_steps, *peaks)


def forget(device: torch.device) -> None:
    """Give back what a network has left, so that the next one finds all of the device."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
