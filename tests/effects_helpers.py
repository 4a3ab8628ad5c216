"""What an entry of test_settings_have_effect.py can be, and how its effect is looked for."""

from __future__ import annotations

import copy
import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from text_helpers import composed

from velora.config.run import Config, validate
from velora.memory.meter import preprocessor_for_shapes
from velora.models.build import build_network
from velora.nn.blocks import is_checkpointed

SMALL = (
    "model.architecture.hidden_size=32", "model.architecture.intermediate_size=48", "task.max_length=16",
    "model.architecture.num_hidden_layers=2", "trainer.batch_size=4", "trainer.max_grad_norm=null",
)  # fmt: skip
TINY_VIT = ("task=digits", "method=full", "model.overrides={patch_size:8,embed_dim:32,depth:2,num_heads:2}")

TINY_RESNET = (
    "task=digits",
    "method=full",
    "model=resnet_tiny",
    "model.overrides={layers:[1,1,1,1],channels:[16,32,32,32]}",
)


@dataclass(frozen=True)
class Network:
    """`base`: overrides of both sides; `value`: the key's other one; `besides`: more overrides of the other side."""

    value: Any
    base: str = ""
    vision: bool = False
    besides: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Arguments:
    value: Any
    base: str = ""


@dataclass(frozen=True)
class Shapes:
    value: Any
    base: str = ""


@dataclass(frozen=True)
class Read:
    file: str


class Label:
    pass


@functools.cache
def composed_once(*overrides: str) -> Config:
    return composed(*overrides)


def both(key: str, effect: Any, *overrides: str) -> tuple[Config, Config]:
    """The configuration of an entry, and the same one with the key's other value."""
    base = composed_once(*overrides, *effect.base.split())
    raw = copy.deepcopy(base.raw)
    group, _, field = key.partition(".")
    for path, value in (
        (f"{group.partition('=')[0]}.{field}" if field else key, effect.value),
        *getattr(effect, "besides", ()),
    ):
        section, _, name = path.rpartition(".")
        target = raw[section] if section else raw
        assert target.get(name) != value, f"{path} has this value already"
        target[name] = value
    return base, validate(raw)


def trained(config: Config) -> Any:
    """A digest of all that three training steps leave, of the gradients that lie there, and of how the network was built."""
    network, changes = build_network(config, config.task.head(config), preprocessor := preprocessor_for_shapes(config))
    network.train()
    torch.manual_seed(0)
    batches = [_batch(config) for _ in range(3)]
    config.activations.calibrate(network, [batches[0]])
    optimizer = config.optimizer.build(network, config)
    digest = hashlib.sha256()
    for step, batch in enumerate(batches, start=1):
        network(**batch).loss.backward()
        _add(digest, [p.grad for p in network.parameters()])
        optimizer.step()
        config.after_step(network, optimizer, step)
        optimizer.zero_grad()
    _add(digest, [*network.parameters(), *network.buffers()])
    _add(digest, list(optimizer.state.values()))
    options = [{k: v for k, v in group.items() if k == "fused"} for group in optimizer.param_groups]
    settings = getattr(getattr(network, "config", None), "_attn_implementation", None)
    again = [getattr(module.forward, "__name__", None) for module in network.modules() if is_checkpointed(module)]
    built = [preprocessor.describe() if hasattr(preprocessor, "describe") else None, again]
    return digest.hexdigest(), changes, str(options), settings, str(built)


def _batch(config: Config) -> dict[str, torch.Tensor]:
    batch = {}
    for name, (shape, dtype) in config.task.batch_shapes(4, config).items():
        whole = not getattr(torch, dtype).is_floating_point
        batch[name] = torch.randint(1, 10, shape) if whole else torch.randn(shape)
    return batch


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, dict):
        value = [item for _, item in sorted(value.items(), key=lambda pair: str(pair[0]))]
    if isinstance(value, list | tuple):
        for item in value:
            _add(digest, item)
    elif isinstance(value, torch.Tensor):
        plain = value.detach().contiguous()
        digest.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.view(torch.uint8).numpy().tobytes() if plain.ndim else str(plain.item()).encode())
        if hasattr(value, "quant_state"):
            _add(digest, [value.quant_state.absmax, str(value.quant_state.dtype)])
    else:
        digest.update(str(value).encode() if isinstance(value, str | int | float | type(None)) else b"?")


def trainer_arguments(config: Config, folder: Path) -> dict[str, Any]:
    from velora.run.arguments import training_arguments
    from velora.run.order import StepBatches

    trainer = config.trainer
    arguments = training_arguments(config, folder, trainer.eval_every).to_dict()
    batches = StepBatches(
        1001, trainer.batch_size, trainer.examples_per_forward, drop_last=trainer.drop_last,
        seed=config.seed, rank=0, num_processes=1,
    )  # fmt: skip
    return {**arguments, "batches": list(batches)}


def shapes(config: Config) -> Any:
    return config.task.batch_shapes(4, config), config.task.head(config)
