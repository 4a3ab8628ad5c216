"""A network of fake tensors: shapes, types and storages of a size, and no memory.

It is built on PyTorch's "meta" device, where every library can build (PEFT and bitsandbytes included) but nothing can train,
and then each of its tensors is replaced by a fake one that claims to be on the CPU, where training runs.

Programs that look into a tensor (is this gradient finite?) get the answer that lets a healthy run go on: yes, or one.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from velora.config.run import Config
from velora.memory.batches import preprocessor_for_shapes
from velora.models.build import build_network
from velora.nn.twin import VeloraTwin


class Answers(TorchDispatchMode):
    """While entered, a fake tensor that is asked for its value says True, or 1."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        return func(*args, **(kwargs or {}))


def fake_network(config: Config, fake: FakeTensorMode) -> nn.Module:
    """The network of a configuration on all axes but the optimizer's, ready to train, without weights.

    Raises ConfigError where a run would, before anything is downloaded.
    """
    fill_caches()
    config = config.model_copy(update={"model": config.model.model_copy(update={"pretrained": False})})
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        network, _ = build_network(config, config.task.head(config), preprocessor_for_shapes(config))
    _Faker(fake).replace_in(network)
    for module in network.modules():
        if isinstance(module, VeloraTwin):
            module._calibrated = True  # there is no direction to look at
    return network.train()


class _Faker:
    """Fake tensors for meta tensors; what was shared stays shared."""

    def __init__(self, fake: FakeTensorMode) -> None:
        self.fake = fake
        self._made: dict[int, tuple[Tensor, Tensor]] = {}  # the first keeps the identity of the second's key alive

    def replace_in(self, network: nn.Module) -> None:
        for module in network.modules():
            for tensors in (module._parameters, module._buffers, vars(module)):
                for name, tensor in list(tensors.items()):
                    if isinstance(tensor, Tensor):
                        tensors[name] = self.tensor(tensor)
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


def fill_caches() -> None:
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
