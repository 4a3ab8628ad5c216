"""From a configuration to a network ready for training: one place for velora-train, velora-memory and scripts."""

from __future__ import annotations

from typing import Any

from torch import nn

from velora.config.parts import Head
from velora.config.roles import roles_of
from velora.config.run import Config
from velora.memory.storages import model_tensors, unique_bytes


def build_network(config: Config, head: Head, preprocessor: Any) -> tuple[nn.Module, str | None]:
    """The network on all axes but the optimiser's, and a text that says what `activations` and `recompute` changed."""
    network = config.model.build(head, preprocessor, config)
    network.velora_roles = roles_of(network, config.model.roles)  # type: ignore[assignment]
    network = config.weights.apply(network, config)
    network = config.adapter.apply(network, config)
    changes = [config.activations.apply(network, config), config.recompute.apply(network, config)]
    return network, "\n".join(filter(None, changes)) or None


def parameter_counts(network: nn.Module) -> dict[str, int]:
    """Numbers of parameters, shared ones once. A 4-bit weight counts as what it stands for."""
    total = trainable = 0
    for parameter in network.parameters():
        state = getattr(parameter, "quant_state", None)
        num = state.shape.numel() if state is not None else parameter.numel()
        total += num
        trainable += num if parameter.requires_grad else 0
    return {"total": total, "trainable": trainable}


def weights_bytes(network: nn.Module) -> int:
    """Bytes of parameters and buffers, and of what belongs to a quantised weight, each storage once."""
    return unique_bytes(model_tensors(network))
