"""Where a run trains, and what cannot be done there."""

from __future__ import annotations

import torch

from velora.config.processes import num_processes
from velora.config.run import Config
from velora.errors import ConfigError


def chosen_device(config: Config) -> torch.device:
    """What `trainer.device` comes to on this machine, whether or not the run can train there."""
    return torch.device("cuda" if config.trainer.device != "cpu" and torch.cuda.is_available() else "cpu")


def training_device(config: Config) -> torch.device:
    """The device of `trainer.device`; ConfigError for one that this machine has not, or a setting that means nothing there."""
    trainer = config.trainer
    if trainer.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("trainer.device=cuda: this machine has no CUDA device; use trainer.device=auto or cpu")
    device = chosen_device(config)
    if trainer.precision == "fp16" and device.type == "cpu":
        raise ConfigError(
            "trainer.precision=fp16 scales the loss, which needs a CUDA device, and here the CPU would train; use "
            "trainer.precision=bf16 or fp32"
        )
    if device.type == "cpu" and (setting := config.recompute.needs_a_gpu()):
        raise ConfigError(
            f"{setting} has no effect where the CPU trains, as it would here, for what it moves is in the CPU's memory "
            f"already; leave it out, or train on a GPU"
        )
    if trainer.precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError("trainer.precision=bf16: this GPU has no bfloat16; use trainer.precision=fp16 or fp32")
    return device


def device_name(device: torch.device) -> str:
    """For the record, whose bytes are those of one process."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    processes = num_processes()
    return name if processes == 1 else f"{name}, one of {processes} processes"


def synchronise(device: torch.device) -> None:
    """Wait for what the device still has queued."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
