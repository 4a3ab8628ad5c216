"""What the device really used in some training steps, term by term and phase by phase.

The split comes from a `Timeline` on real tensors, on any device. On CUDA the allocator's own peaks stand beside it, read
and reset at each change of phase, and what they have more is stated as unexplained. On the CPU no allocator can be asked,
so the timeline is the measurement, and the resident size of the process stands beside it.

Measuring costs time: Python runs at every operator. Steps of llama_tiny and llama_60m took 1.8 to 2.0 times as much CPU
time under it (one thread). So the meter is for a few steps of their own, never for a run whose speed is reported. It changes
neither values nor random numbers, and it never calls `empty_cache`: what it sees is what the run would do without it.

The steps of a configuration, which the meter runs and the estimate pretends to run, are here too: a batch of the shapes that the
task has (of the data only shapes count), its loss as the training loop computes it, and the order of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from velora.config.run import Config
from velora.memory.timeline import MemoryFigures, Timeline, figures_of
from velora.models.build import build_network
from velora.run.device import training_device

CUDA_BLOCK_BYTES = 512  # the caching allocator's smallest step


class Meter:
    """Measures the training steps that run while `measuring()` is entered, in whatever loop runs them.

        meter = Meter(model)
        with meter.measuring(optimizer):
            ...one warm-up step and at least one more...
        print(meter.figures)

    `model` is on its device already. The optimizer may be given later, by `meter.timeline.follow(optimizer)`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.device = next(model.parameters()).device
        block = CUDA_BLOCK_BYTES if self.device.type == "cuda" else 1
        self.timeline = Timeline(model, self.device.type, block, self._on_phase)
        self._device_peaks: dict[str, dict[str, int]] = {}
        self._phase = "load"
        self._num_forwards = 0
        self._after_load_bytes = 0
        self._process = psutil.Process()
        self._rss_bytes = 0
        self._figures: MemoryFigures | None = None

    @contextmanager
    def measuring(self, optimizer: torch.optim.Optimizer | None = None) -> Iterator[None]:
        self._reset_device_peaks()
        with self.timeline.watch():
            self._after_load_bytes = self.timeline.live_bytes
            if optimizer is not None:
                self.timeline.follow(optimizer)
            yield
        self._on_phase("end")
        rss = self._rss_bytes if self.device.type == "cpu" else None
        self._figures = figures_of(
            self.timeline, "metered", _name_of(self.device), self._num_forwards, self._after_load_bytes,
            self._device_peaks, rss,
        )  # fmt: skip

    @property
    def figures(self) -> MemoryFigures:
        assert self._figures is not None, "the figures are there when the measurement has ended"
        return self._figures

    def _on_phase(self, phase: str) -> None:
        """Close the books of the phase that ends; `phase` begins."""
        self._rss_bytes = max(self._rss_bytes, self._process.memory_info().rss)
        if self.device.type == "cuda":
            name = "after load" if self._phase == "load" else self._phase
            ended = self._device_peaks.setdefault(name, {"allocated": 0, "reserved": 0})
            ended["allocated"] = max(ended["allocated"], torch.cuda.max_memory_allocated(self.device))
            ended["reserved"] = max(ended["reserved"], torch.cuda.max_memory_reserved(self.device))
            self._reset_device_peaks()
        self._num_forwards += phase == "forward"
        self._phase = phase

    def _reset_device_peaks(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)


def synthetic_batch(
    config: Config, batch_size: int, padded: bool = False, make: Callable[..., Tensor] = torch.ones
) -> dict[str, Tensor]:
    """Sequences of full length, all words 1 (which pads in no tokenizer that counts), all labels 1, no masked position.

    `padded` masks the last position of the first sequence, which makes networks build the attention masks that they leave
    out where nothing is masked. `make` makes the floating-point tensors: fake ones in an estimate.
    """
    batch: dict[str, Tensor] = {}
    for name, (shape, dtype_name) in config.task.batch_shapes(batch_size, config).items():
        dtype = getattr(torch, dtype_name)
        batch[name] = make(shape, dtype=dtype) if dtype.is_floating_point else torch.ones(shape, dtype=dtype)
    if padded and "attention_mask" in batch:
        batch["attention_mask"][0, -1] = 0
    return batch


def random_batch(config: Config, network: nn.Module) -> dict[str, Tensor]:
    """A batch of the task's shapes: random words, and the same ones as labels of a language model; random images and classes."""
    device = next(network.parameters()).device
    generator = torch.Generator().manual_seed(0)
    batch = synthetic_batch(config, config.trainer.examples_per_forward)
    for name, tensor in batch.items():
        if name == "input_ids":
            num_words = network.get_input_embeddings().num_embeddings  # type: ignore[operator]
            batch[name] = torch.randint(3, num_words, tensor.shape, generator=generator)
        elif tensor.is_floating_point():
            batch[name] = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        elif name == "labels":
            num_labels = config.task.head(config).num_labels
            words = batch.get("input_ids")
            batch[name] = words.clone() if num_labels is None and words is not None else torch.randint(
                num_labels or 1, tensor.shape, generator=generator
            )  # fmt: skip
    return {name: tensor.to(device) for name, tensor in batch.items()}


def autocast_dtype(config: Config) -> torch.dtype | None:
    """What trainer.precision lets autocast compute in; None for fp32, without autocast."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.trainer.precision)


def training_loss(network: nn.Module, batch: dict[str, Tensor], config: Config) -> Callable[[], Tensor]:
    """One forward in trainer.precision; the outputs are brought to float32 outside autocast, as accelerate does it."""
    dtype = autocast_dtype(config)

    def forward() -> Tensor:
        if dtype is None:
            return network(**batch).loss
        device = next(network.parameters()).device.type
        with torch.autocast(device, dtype=dtype):
            outputs = network(**batch)
        return type(outputs)({name: _to_float32(value) for name, value in outputs.items()}).loss

    return forward


class _NoTokenizer:
    """In place of a tokenizer whose vocabulary the architecture states anyway."""

    bos_token_id = eos_token_id = pad_token_id = 0


def preprocessor_for_shapes(config: Config) -> Any:
    """The preprocessor of a network's builder; no tokenizer is loaded where the architecture states its vocabulary."""
    architecture = getattr(config.model, "architecture", None)
    if architecture is not None and architecture.get("vocab_size", 0) is not None:
        return _NoTokenizer()
    return config.model.preprocessor(config)


def network_without_weights(config: Config) -> nn.Module:
    """The network of a configuration on all axes but the optimizer's; its weights are random, and nothing is read for them.

    Raises ConfigError where a run would.
    """
    config = config.model_copy(update={"model": config.model.model_copy(update={"pretrained": False})})
    return build_network(config, config.task.head(config), preprocessor_for_shapes(config))[0]


def _to_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def training_steps(
    model: nn.Module,
    micro_batches: Sequence[Callable[[], Tensor]],
    optimizer: torch.optim.Optimizer,
    *,
    num_steps: int = 2,
    max_grad_norm: float | None = None,
    after_step: Callable[[int], Any] = lambda _step: None,
    timeline: Timeline | None = None,
) -> None:
    """Plain training steps, in the order in which transformers' Trainer does things.

    Each of `micro_batches` computes one loss; their mean is what a step follows. The second step is the first one with
    the optimizer's state in place.
    """
    for step in range(1, num_steps + 1):
        for forward in micro_batches:
            loss = forward()
            if timeline is not None:
                timeline.forward_ended(loss)
            torch.autograd.backward(loss / len(micro_batches) if len(micro_batches) > 1 else loss)
            del loss
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        after_step(step)
        if timeline is not None:
            timeline.settle()
        model.zero_grad()


def measure_steps(
    model: nn.Module,
    micro_batches: Sequence[Callable[[], Tensor]],
    optimizer: torch.optim.Optimizer,
    *,
    num_steps: int = 2,
    max_grad_norm: float | None = None,
    after_step: Callable[[int], Any] = lambda _step: None,
) -> MemoryFigures:
    """Run and measure real training steps (the weights change): one to warm up and `num_steps` - 1 more."""
    meter = Meter(model)
    with meter.measuring(optimizer):
        training_steps(
            model, micro_batches, optimizer,
            num_steps=num_steps, max_grad_norm=max_grad_norm, after_step=after_step, timeline=meter.timeline,
        )  # fmt: skip
    return meter.figures


def measure(config: Config, *, num_steps: int = 2, padded: bool = False) -> MemoryFigures:
    """Build the network of a configuration and measure training steps of it on a synthetic batch, on this machine.

    The weights are random: how many bytes there are does not depend on them. `padded`: see `synthetic_batch`.
    Raises ConfigError where this machine has not the device of the configuration.
    """
    device = training_device(config)
    network = network_without_weights(config).to(device).train()
    shape = (config, config.trainer.examples_per_forward, padded)
    first, *others = [synthetic_batch(*shape) for _ in range(config.trainer.accumulation_steps)]
    batches = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in (first, *others)]
    config.activations.pretend_calibrated(network)
    optimizer = config.optimizer.build(network, config)
    meter = Meter(network)
    with meter.measuring(optimizer):
        meter.timeline.register("batch", [tensor for batch in batches for tensor in batch.values()])
        training_steps(
            network,
            [training_loss(network, batch, config) for batch in batches],
            optimizer,
            num_steps=num_steps,
            max_grad_norm=config.trainer.max_grad_norm,
            after_step=partial(config.after_step, network, optimizer),
            timeline=meter.timeline,
        )
    return meter.figures


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
