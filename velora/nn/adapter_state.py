"""What an adapter has trained, apart from the network: save it alone, load it again, fold it in.

    save_adapter(model, folder)      only what trains: megabytes, where the network has gigabytes
    load_adapter(model, folder)      into a network with the same adapter applied
    merge_adapter(model)             a plain network with the same outputs, for inference

An adapter that PEFT made is kept in PEFT's format (adapter_config.json, adapter_model.safetensors), so that
`PeftModel.from_pretrained(network, folder)` reads it too. Every other one is `adapter.safetensors`: the parameters that
train under their names in the network, and with LTE the weights that were merged into. Wrappers (torch.compile, DDP) around the
network or parts of it are seen through; a network that fully_shard has sharded is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from velora.errors import ConfigError
from velora.nn.quantised import dense_linear, is_quantised
from velora.nn.swap import unwrap, unwrapped
from velora.nn.twin import BUFFERS

FILE = "adapter.safetensors"


@contextmanager
def _whole(model: nn.Module) -> Iterator[nn.Module]:
    """The network without wrappers; ConfigError where this process holds only parts of its parameters."""
    with unwrapped(model) as network:
        _refuse_sharded(network)
        yield network


def _refuse_sharded(network: nn.Module) -> None:
    sharded = [name for name, parameter in network.named_parameters() if hasattr(parameter, "placements")]
    if sharded:
        raise ConfigError(
            f"{sharded[0]} and {len(sharded) - 1} other parameters are sharded over processes (fully_shard); gather them "
            "into a network that is not, with torch.distributed.checkpoint.state_dict.get_model_state_dict"
        )


def _is_peft(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Write the parameters that train to `folder`, and nothing of what stays as it was; VeLoRA's directions are left out."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _whole(model) as network:
        if _is_peft(network):
            parameters = dict(network.named_parameters(remove_duplicate=False))
            network.save_pretrained(str(folder), state_dict=parameters, save_embedding_layers=False)  # type: ignore[operator]
            return
        from safetensors.torch import save_file

        own = {name: tensor.detach().cpu().contiguous() for name, tensor in _own_tensors(network).items()}
        save_file(own, str(folder / FILE), metadata={"format": "pt"})


def _own_tensors(network: nn.Module) -> dict[str, Tensor]:
    """What an adapter has changed: the parameters that train, and what a module names in `moving_state` (LTE's merged weights)."""
    own: dict[str, Tensor] = {name: p for name, p in network.named_parameters() if p.requires_grad}
    state = network.state_dict(keep_vars=True)
    for path, module in network.named_modules():
        names = (f"{path}.{name}".lstrip(".") for name in getattr(type(module), "moving_state", ()))
        own |= {name: state[name] for name in names if name in state}
    return own


def save_network(model: nn.Module, folder: str | Path) -> None:
    """Write the whole network as plain layers would be, so that any program reads it: VeLoRA's directions are left out, and int8
    weights are what their codes stand for."""
    from velora.nn.apply import velora_layers
    from velora.nn.int8 import dense_states

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _whole(model) as network, dense_states(network):
        own = {f"{name}.{buffer}" for name in velora_layers(network) for buffer in BUFFERS}
        state = {name: tensor for name, tensor in network.state_dict().items() if name not in own}
        if hasattr(network, "save_pretrained"):
            network.save_pretrained(str(folder), state_dict=state)  # type: ignore[operator]
            return
        from safetensors.torch import save_file

        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        save_file(contiguous, str(folder / "model.safetensors"), metadata={"format": "pt"})


def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Read what `save_adapter` wrote into a network to which the same adapter has been applied, in place.

    VeLoRA's directions, which PEFT's own save_pretrained writes too, are passed over: a network's directions come from
    `calibrate` or from its own checkpoint.

    Raises ConfigError where a file is missing, cannot be read, holds inf or NaN, or belongs to another adapter or network;
    the network is untouched then.
    """
    with _whole(model) as network:
        if _is_peft(network):
            _load_into_peft(network, Path(folder))
            return
        expected = _own_tensors(network)
        state = _read(Path(folder) / FILE, expected)
        with torch.no_grad():
            for name, parameter in expected.items():
                parameter.copy_(state[name])


def _load_into_peft(model: nn.Module, folder: Path) -> None:
    """Each adapter that the model has; PEFT saves those that are not called "default" to a folder of their name."""
    from peft import set_peft_model_state_dict

    folders = {name: folder if name == "default" else folder / name for name in model.peft_config}  # type: ignore[union-attr]
    states = {
        name: _read(place / "adapter_model.safetensors", _peft_state(model, name)) for name, place in folders.items()
    }
    for name, state in states.items():
        set_peft_model_state_dict(model, state, adapter_name=name)


def _read(file: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file; ConfigError unless they are what `expected` has by names and shapes, and finite."""
    if not file.is_file():
        raise ConfigError(
            f"{file.parent} holds no {file.name}: it is not a folder that an adapter of this kind was saved to"
        )
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(str(file))
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{file} cannot be read ({error}): it is damaged or no safetensors file; save it again"
        ) from None
    state = {name: t for name, t in state.items() if name in expected or name.rpartition(".")[2] not in BUFFERS}
    wrong = sorted(state.keys() ^ expected.keys())
    wrong += [n for n in state.keys() & expected.keys() if state[n].shape != expected[n].shape]
    if wrong:
        raise ConfigError(
            f"{file} belongs to another adapter or network: {len(wrong)} of its parameters do not fit, {wrong[0]} among them"
        )
    broken = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ConfigError(
            f"{file} holds inf or NaN in {len(broken)} of its parameters, {broken[0]} among them; take an earlier one"
        )
    return state


def merge_adapter(model: nn.Module) -> nn.Module:
    """Fold the adapter into the weights it stands beside and return the plain network; `model` must not be used on.

    The outputs in eval mode are those of the unmerged network, up to rounding to the weights' dtype. A layer in four bits that an
    adapter stands beside becomes dense, in its compute dtype; quantising the sum again would change the outputs.
    Layers that were made VeLoRA layers are plain ones afterwards.
    """
    from velora.nn.apply import remove_velora

    model, _ = unwrap(model)
    _refuse_sharded(model)
    remove_velora(model)
    if _is_peft(model):
        _merge_into_quantised(model)
        return model.merge_and_unload()  # type: ignore[operator]
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, "merged"):
                setattr(parent, name, child.merged())
    return model


def _peft_state(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    parameters = dict(model.named_parameters(remove_duplicate=False))
    return get_peft_model_state_dict(model, state_dict=parameters, adapter_name=adapter, save_embedding_layers=False)


@torch.no_grad()
def _merge_into_quantised(model: nn.Module) -> None:
    """Replace PEFT's LoRA layers over 4-bit weights by the dense sum W + B A; PEFT itself would quantise the sum again."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            base = getattr(layer, "base_layer", None)
            if base is None or not is_quantised(base):
                continue
            dense = dense_linear(base)
            for adapter in set(layer.active_adapters) & layer.lora_A.keys() - set(layer.merged_adapters):
                dense.weight.add_(layer.get_delta_weight(adapter).to(dense.weight.dtype))
            setattr(parent, name, dense)
