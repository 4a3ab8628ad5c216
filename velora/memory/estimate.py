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
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from velora.config import Config
from velora.memory.as_cuda import AsOnCuda, use_foreach
from velora.memory.batches import synthetic_batch, training_loss
from velora.memory.fake import Answers, fake_network
from velora.memory.figures import MemoryFigures, figures_of
from velora.memory.meter import CUDA_BLOCK_BYTES, training_steps
from velora.memory.timeline import Timeline

Device = Literal["cpu", "cuda"]


def target_device(config: Config) -> Device:
    """The device that an estimate is for: trainer.device; auto means CUDA, since that is what memory is asked for."""
    return "cpu" if config.trainer.device == "cpu" else "cuda"


def estimate(
    config: Config, *, device: Device | None = None, batch_size: int | None = None, padded: bool = False
) -> MemoryFigures:
    """Peak and terms of two training steps of a configuration, on a machine that need not be able to run them.

    `device`: as `target_device` if None. `batch_size`: in place of trainer.batch_size. Raises ConfigError where the
    configuration is refused, as a run would.
    """
    device = device or target_device(config)
    batch_size = batch_size or config.trainer.batch_size
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    network = fake_network(config, fake)
    optimizer = config.optimizer.build(network, config)
    if device == "cuda":
        use_foreach(optimizer)

    def make(*args: Any, **kwargs: Any) -> Tensor:
        with fake:
            return torch.ones(*args, **kwargs)

    num_micro_batches = config.trainer.gradient_accumulation_steps
    batches = [synthetic_batch(config, batch_size, padded, make) for _ in range(num_micro_batches)]
    block = CUDA_BLOCK_BYTES if device == "cuda" else 1
    timeline = Timeline(network, "cpu", block)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        if device == "cuda":
            stack.enter_context(AsOnCuda())
        stack.enter_context(Answers())
        stack.enter_context(timeline.watch())
        after_load = timeline.live_bytes
        timeline.register("batch", [tensor for batch in batches for tensor in batch.values()])
        timeline.follow(optimizer)
        training_steps(
            network,
            [training_loss(network, batch, config) for batch in batches],
            optimizer,
            max_grad_norm=config.trainer.max_grad_norm,
            after_step=config.activations.after_step,
            timeline=timeline,
        )
    return figures_of(timeline, "estimated", device, 2, after_load)


def largest_batch(peak_at: Callable[[int], int], available_bytes: int, limit: int = 2**20) -> int:
    """The largest batch size whose peak fits, 0 if not even one does; `peak_at` is called about 2 log2(result) times.

    The peak must not fall with the batch size.
    """
    if peak_at(1) > available_bytes:
        return 0
    fits, too_large = 1, 2
    while too_large <= limit and peak_at(too_large) <= available_bytes:
        fits, too_large = too_large, 2 * too_large
    while too_large - fits > 1:
        middle = (fits + too_large) // 2
        if peak_at(middle) <= available_bytes:
            fits = middle
        else:
            too_large = middle
    return fits


def methods_compared(configs: Iterator[Config], device: Device | None = None) -> dict[str, MemoryFigures]:
    """Estimates by name of the method."""
    return {config.method.name: estimate(config, device=device) for config in configs}
