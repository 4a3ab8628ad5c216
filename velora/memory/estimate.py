"""What a configuration would use, without its device, its weights or its data.

The network, its adapter and its optimizer are made of fake tensors: shapes, types and storages of a size, and no memory. They
are built on PyTorch's "meta" device, where every library can build (PEFT and bitsandbytes included) but nothing can train, and
then each tensor is replaced by a fake one that claims to be on the CPU, where training runs. Two training steps then
run as they would, operator by operator, and a `Timeline` adds up what lives. Nothing is modelled, so every method is
covered by the code that implements it; what cannot be known this way is what operators use inside themselves.

Small real tensors (words, masks, positions) stay real, because networks look into them: transformers leaves out
an attention mask that masks nothing. All sequences have full length; `padded=True` pads one of them, which brings the mask
back. Programs that look into a fake tensor (is this gradient finite?) get the answer that lets a healthy run go on: yes, or one.

Fake tensors of device "cuda" cannot run a backward on a machine without one. For CUDA, six things are therefore made on
the CPU as CUDA makes them (`AsOnCuda`, `use_foreach`):

- dropout keeps a mask of one byte per element (the CPU keeps one of the input's type);
- products of halves that ask for a float32 result need no cast copies (`sum_over_tokens`);
- fused attention keeps no matrix of probabilities, with dropout either (the CPU has no fused kernel with dropout);
- autocast computes normalisations, softmaxes, losses, powers and sums in float32 (the CPU's leaves most of them in half);
- what is moved to the CPU's memory takes nothing (`recompute.offload`);
- optimizers without a fused form update all tensors together (`foreach`), with temporaries as large as all of them.

The caching allocator's rounding to 512 bytes is the timeline's part. What operators use inside themselves (workspaces of
cuBLAS and cuDNN) and what CUDA itself takes (some hundred MiB per process) is in no figure.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from velora.config.run import Config
from velora.errors import ConfigError
from velora.memory.meter import (
    CUDA_BLOCK_BYTES,
    network_without_weights,
    synthetic_batch,
    training_loss,
    training_steps,
)
from velora.memory.timeline import MemoryFigures, Timeline, figures_of
from velora.nn.blocks import from_host, to_host
from velora.nn.projection import sum_over_tokens
from velora.report.text import human_bytes

LARGEST_SEARCHED = 2**20
"""Examples of a forward where the search for the largest batch ends."""

Device = Literal["cpu", "cuda"]


def target_device(config: Config) -> Device:
    """The device that an estimate is for: trainer.device; auto means CUDA, since that is what memory is asked for."""
    return "cpu" if config.trainer.device == "cpu" else "cuda"


@dataclass(frozen=True)
class Pretended:
    """A configuration built of fake tensors, and the losses of its micro-batches; run them inside `context()`, which
    raises ConfigError where the network looks into its data."""

    config: Config
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
            stack.enter_context(_Answers())
            try:
                yield
            except DataDependentOutputException:
                raise ConfigError(
                    f"model={self.config.model.name} cannot be estimated: its forward looks into the data, which an estimate "
                    "does not have; `velora-train trainer.max_steps=1` counts what it keeps"
                ) from None


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
    return Pretended(config, network, batches, losses, device or target_device(config))


def _refuse_beyond_memory(config: Config, size: int, num_micro_batches: int) -> None:
    """Words, labels and masks are real tensors here; ConfigError before they take this machine's memory."""
    shapes = [(shape, getattr(torch, dtype)) for shape, dtype in config.task.batch_shapes(size, config).values()]
    real = sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes if not dtype.is_floating_point)
    if num_micro_batches * real > psutil.virtual_memory().available / 2:
        raise ConfigError(
            f"trainer.batch_size={size * num_micro_batches}: words and labels of one step alone take "
            f"{human_bytes(num_micro_batches * real)}, too much for the memory of this machine; give a smaller batch"
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
            after_step=partial(config.after_step, pretended.network, optimizer),
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


class _Answers(TorchDispatchMode):
    """While entered, a fake tensor that is asked for its value says True, or 1."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        return func(*args, **(kwargs or {}))


def fake_network(config: Config, fake: FakeTensorMode) -> nn.Module:
    """The network of a configuration on all axes but the optimizer's, ready to train, without weights.

    Raises ConfigError where a run would, before anything is downloaded.
    """
    _fill_caches()
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        network = network_without_weights(config)
    _Faker(fake).replace_in(network)
    config.activations.pretend_calibrated(network)
    return network.train()


class _Faker:
    """Fake tensors for meta tensors; what was shared stays shared."""

    def __init__(self, fake: FakeTensorMode) -> None:
        self.fake = fake
        self._made: dict[int, tuple[Tensor, Tensor]] = {}  # the first keeps the identity of the second's key alive

    def replace_in(self, network: nn.Module) -> None:
        for module in network.modules():
            attributes = [(name, value) for name, value in vars(module).items() if isinstance(value, Tensor)]
            parameters = module.named_parameters(recurse=False, remove_duplicate=False)
            buffers = module.named_buffers(recurse=False, remove_duplicate=False)
            for name, tensor in [*attributes, *parameters, *buffers]:
                setattr(module, name, self.tensor(tensor))
            state = getattr(getattr(module, "weight", None), "quant_state", None)
            if state is not None and hasattr(module, "quant_state"):
                module.quant_state = state

    def tensor(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._made:
            with self.fake, torch.no_grad():
                made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made, requires_grad=tensor.requires_grad)
                for name, value in vars(tensor).items():  # what a 4-bit weight has beside its codes
                    setattr(made, name, self._attribute(value))
            self._made[id(tensor)] = (tensor, made)
        return self._made[id(tensor)][1]

    def _attribute(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.tensor(value)
        if type(value).__name__ != "QuantState":
            return value
        value = copy.copy(value)
        for name, inner in vars(value).items():
            setattr(value, name, self._attribute(inner))
        return value


def _fill_caches() -> None:
    """Have constants that libraries keep for the life of the process made of real tensors before fake ones are about."""
    with contextlib.suppress(ImportError):
        import bitsandbytes.functional

        from velora.optim.quantised_state import dynamic_map

        makers: list[Callable[[], Any]] = [
            lambda: dynamic_map(True, torch.device("cpu")),
            lambda: dynamic_map(False, torch.device("cpu")),
            lambda: bitsandbytes.functional.quantize_blockwise(torch.zeros(256)),
        ]
        for make in makers:
            make()


# https://docs.pytorch.org/docs/stable/amp.html, "CUDA Ops that can autocast to float32", by the names Python calls them
# fmt: off
_IN_FLOAT32 = {
    "__pow__", "__rdiv__", "__rpow__", "__rtruediv__", "acos", "asin", "binary_cross_entropy_with_logits", "cosh",
    "cosine_embedding_loss", "cdist", "cosine_similarity", "cross_entropy", "cumprod", "cumsum", "dist", "erfinv", "exp",
    "expm1", "group_norm", "hinge_embedding_loss", "kl_div", "l1_loss", "layer_norm", "log", "log10", "log_softmax",
    "log1p", "log2", "margin_ranking_loss", "mse_loss", "multilabel_margin_loss", "multi_margin_loss", "nll_loss",
    "norm", "normalize", "pdist", "poisson_nll_loss", "pow", "prod", "reciprocal", "rsqrt", "sinh", "smooth_l1_loss",
    "soft_margin_loss", "softmax", "softmin", "softplus", "sum", "renorm", "tan", "triplet_margin_loss",
}
# fmt: on
_HALF = (torch.float16, torch.bfloat16)


class AsOnCuda(TorchFunctionMode):
    """While entered, dropout and autocast on CPU tensors keep and compute what they would on CUDA."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.autograd.backward:
            with self:  # for what checkpointed regions compute again
                return _backward(*args, **kwargs)
        if func is torch.nn.functional.dropout:
            return _dropout(*args, **kwargs)
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is to_host:
            return args[0].new_empty(0), args[0].shape
        if func is from_host:
            nothing, shape = args[0]
            return nothing.new_empty(shape)
        if func is sum_over_tokens and args[0].dtype in _HALF:
            return _float32_of_halves(*args)
        if torch.is_autocast_enabled("cpu") and getattr(func, "__name__", "") in _IN_FLOAT32:
            args = tuple(_in_float32(value) for value in args)
            kwargs = {name: _in_float32(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _backward(tensors: Any, grad_tensors: Any = None, **_options: Any) -> None:
    """torch.autograd.backward without its own look at function modes, inside which they would all be off."""
    tensors = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
    gradients = (None,) * len(tensors) if grad_tensors is None else tuple(grad_tensors)
    starts = tuple(torch.ones_like(t) if g is None else g for t, g in zip(tensors, gradients, strict=True))
    engine = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
    engine.run_backward(tensors, starts, False, False, (), allow_unreachable=True, accumulate_grad=True)


def _in_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _HALF else value


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or p == 0.0:
        return input
    return torch.native_dropout(input, p, True)[0]


def _float32_of_halves(a: Tensor, b: Tensor) -> Tensor:
    """One product with a float32 result, and no cast copy: only the size counts."""
    return a.new_empty(*a.shape[:-2], a.shape[-1], b.shape[-1], dtype=torch.float32)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **options: Any
) -> Tensor:
    """The fused kernels of CUDA draw their dropout anew in backward: what they keep does not depend on it."""
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask, 0.0, **options)


def use_foreach(optimizer: torch.optim.Optimizer) -> None:
    """Let torch's own optimizers choose as they do on CUDA, where `foreach` is the default."""
    for group in optimizer.param_groups:
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = True
