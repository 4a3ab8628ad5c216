"""What a configuration would use, without its device, its weights or its data.

The network, its adapter and its optimizer are made of fake tensors (see `velora/memory/fake.py`). Two training steps then
run as they would, operator by operator, and a `Timeline` adds up what lives. Nothing is modelled, so every method is
covered by the code that implements it; what cannot be known this way is what operators use inside themselves.

Small real tensors (words, masks, positions) stay real, because networks look into them: transformers leaves out
an attention mask that masks nothing. All sequences have full length; `padded=True` pads one of them, which brings the mask
back.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from velora.config.run import Config
from velora.errors import ConfigError
from velora.memory.as_cuda import AsOnCuda, use_foreach
from velora.memory.batches import synthetic_batch, training_loss
from velora.memory.fake import Answers, fake_network
from velora.memory.figures import MemoryFigures, figures_of
from velora.memory.meter import CUDA_BLOCK_BYTES, training_steps
from velora.memory.timeline import Timeline
from velora.memory.units import format_bytes

LARGEST_SEARCHED = 2**20
"""Examples of a forward where the search for the largest batch ends."""

Device = Literal["cpu", "cuda"]


def target_device(config: Config) -> Device:
    """The device that an estimate is for: trainer.device; auto means CUDA, since that is what memory is asked for."""
    return "cpu" if config.trainer.device == "cpu" else "cuda"


@dataclass(frozen=True)
class Pretended:
    """A configuration built of fake tensors, and the losses of its micro-batches; run them inside `context()`."""

    network: nn.Module
    batches: list[dict[str, Tensor]]
    losses: list[Callable[[], Tensor]]
    device: Device

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            if self.device == "cuda":
                stack.enter_context(AsOnCuda())
            stack.enter_context(Answers())
            yield


def pretend(
    config: Config, *, device: Device | None = None, batch_size: int | None = None, padded: bool = False
) -> Pretended:
    """Build a configuration without weights and data; the arguments are those of `estimate`."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    network = fake_network(config, fake)

    def make(*args: Any, **kwargs: Any) -> Tensor:
        with fake:
            return torch.ones(*args, **kwargs)

    num_micro_batches = config.trainer.accumulation_steps
    size = batch_size or config.trainer.examples_per_forward
    _refuse_beyond_memory(config, size, num_micro_batches)
    batches = [synthetic_batch(config, size, padded, make) for _ in range(num_micro_batches)]
    losses = [training_loss(network, batch, config) for batch in batches]
    return Pretended(network, batches, losses, device or target_device(config))


def _refuse_beyond_memory(config: Config, size: int, num_micro_batches: int) -> None:
    """Words, labels and masks are real tensors here; ConfigError before they take this machine's memory."""
    shapes = [(shape, getattr(torch, dtype)) for shape, dtype in config.task.batch_shapes(size, config).values()]
    real = sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes if not dtype.is_floating_point)
    if num_micro_batches * real > psutil.virtual_memory().available / 2:
        raise ConfigError(
            f"trainer.batch_size={size * num_micro_batches}: words and labels of one step alone take "
            f"{format_bytes(num_micro_batches * real)}, too much for the memory of this machine; give a smaller batch"
        )


def estimate(
    config: Config, *, device: Device | None = None, batch_size: int | None = None, padded: bool = False
) -> MemoryFigures:
    """Peak and terms of two training steps of a configuration, on a machine that need not be able to run them.

    `device`: as `target_device` if None. `batch_size`: of one forward, in place of the configuration's. `padded`: see
    `synthetic_batch`.
    Raises ConfigError where the configuration is refused, as a run would.
    """
    pretended = pretend(config, device=device, batch_size=batch_size, padded=padded)
    on_cuda = pretended.device == "cuda"
    optimizer = config.optimizer.build(pretended.network, config)
    if on_cuda:
        use_foreach(optimizer)
    timeline = Timeline(pretended.network, "cpu", CUDA_BLOCK_BYTES if on_cuda else 1)
    with pretended.context(), timeline.watch():
        after_load = timeline.live_bytes
        timeline.register("batch", [tensor for batch in pretended.batches for tensor in batch.values()])
        timeline.follow(optimizer)
        training_steps(
            pretended.network,
            pretended.losses,
            optimizer,
            max_grad_norm=config.trainer.max_grad_norm,
            after_step=config.activations.after_step,
            timeline=timeline,
        )
    return figures_of(timeline, "estimated", pretended.device, 2, after_load)


def largest_batch(peak_at: Callable[[int], int], available_bytes: int, limit: int = LARGEST_SEARCHED) -> int:
    """The largest batch size up to `limit` whose peak fits, 0 if not even one does.

    The peak must not fall with the batch size. It is nearly a straight line, so each guess is where the line through
    the two largest known sizes meets what is available: four or five calls of `peak_at`.
    """
    known = {size: peak_at(size) for size in (1, 2)}
    if known[1] > available_bytes:
        return 0
    fits, too_large = (2, limit + 1) if known[2] <= available_bytes else (1, 2)
    while too_large - fits > 1:
        (a, peak_a), (b, peak_b) = sorted(known.items())[-2:]
        slope = max((peak_b - peak_a) / (b - a), 1.0)
        guess = int(a + (available_bytes - peak_a) / slope)
        guess = min(max(guess, fits + 1), too_large - 1)
        known[guess] = peak_at(guess)
        if known[guess] <= available_bytes:
            fits = guess
        else:
            too_large = guess
    return fits
