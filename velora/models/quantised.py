"""Reading a checkpoint into four bits, tensor by tensor: beside the network in four bits only one tensor is in memory whole.

transformers reads a dense network first, which for seven billion weights in half precision is 14 GB before the first one is
quantised. Here the network is built without memory, the shards (safetensors) are opened one after the other, mapped and not
read, and each weight of a linear layer is quantised as it comes. What is not quantised (embeddings, norms, the head) is
copied in its dtype. The result equals, bit for bit, that of quantising the dense network.

That is possible where the checkpoint has just the names and shapes of the network's own parameters; where it has not (a head
that the task brings, names of another version), `read_quantised` says None and transformers reads it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import cached_file

from velora.errors import ConfigError
from velora.nn.head import head_names, is_within
from velora.nn.swap import bare_layers

if TYPE_CHECKING:
    from velora.config.run import Config

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def read_quantised(
    auto_class: Any, network_config: Any, source: str, options: dict[str, Any], config: Config
) -> tuple[nn.Module, dict[str, Any]] | None:
    """The network and what transformers calls its loading info; None where the checkpoint is to be read otherwise.

    `source` is a folder or a hub's name, `options` are those of `from_config`; weights is the configuration's.
    """
    shards = shards_of(source)
    if not shards:
        return None
    with init_empty_weights(include_buffers=False):
        network = auto_class.from_config(network_config, **options)
    network.tie_weights()
    shapes: dict[str, list[int]] = {}
    for shard in shards:
        with safe_open(shard, "pt") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 not a dictionary
    own = dict(network.named_parameters())
    if network.state_dict().keys() - shapes.keys() - _tied(network) or any(
        list(tensor.shape) != shapes[name] for name, tensor in own.items()
    ):
        return None
    _fill(network, shards, set(own), config)
    network.tie_weights()
    unexpected = shapes.keys() - network.state_dict().keys()
    return network.eval(), {"missing_keys": set(), "mismatched_keys": set(), "unexpected_keys": unexpected}


def shards_of(source: str) -> list[Path]:
    """The safetensors files of a checkpoint, fetched where `source` is a hub's name; none where it has no such files."""
    try:
        index = cached_file(source, INDEX)
    except OSError:
        try:
            single = cached_file(source, SINGLE)
        except OSError:
            return []
        return [Path(single)] if single is not None else []
    assert index is not None
    names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    return [Path(str(cached_file(source, name))) for name in names]


def _tied(network: nn.Module) -> set[str]:
    """Further names of parameters that have one already."""
    first = {name for name, _ in network.named_parameters()}
    return {name for name, _ in network.named_parameters(remove_duplicate=False)} - first


def _fill(network: nn.Module, shards: list[Path], own: set[str], config: Config) -> None:
    weights: Any = config.weights
    keep = [*head_names(network), *bare_layers(network)]
    buffers = dict(network.named_buffers())
    quantise = weights.quantiser(network, config)
    for shard in shards:
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name in own:
                    _place(network, name, file.get_tensor(name), keep, quantise, config)
                elif name in buffers:
                    buffers[name].copy_(file.get_tensor(name))


def _place(network: nn.Module, name: str, tensor: Tensor, keep: list[str], quantise: Any, config: Config) -> None:
    """One tensor of a file into its module, in four bits where that is a linear layer's weight."""
    if not all(bound.isfinite() for bound in tensor.aminmax()):  # no temporary tensor of this size
        raise ConfigError(
            f"{config.model.origin()}: the weights {name} are not finite (NaN, or beyond the range of {tensor.dtype}); "  # type: ignore[attr-defined]
            "give a whole checkpoint"
        )
    path, _, kind = name.rpartition(".")
    module = network.get_submodule(path)
    is_dense = kind != "weight" or type(module) is not nn.Linear or is_within(path, keep)
    # what stays is a copy of its own: the file is mapped no longer than it is read
    values = tensor.to(config.weights.dense_dtype(), copy=is_dense)  # type: ignore[attr-defined]
    setattr(module, kind, nn.Parameter(values, requires_grad=getattr(module, kind).requires_grad))
    if is_dense:
        return
    layer = quantise(path, module)  # a bias may still be to come
    parent, _, child = path.rpartition(".")
    setattr(network.get_submodule(parent), child, layer)
