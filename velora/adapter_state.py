"""What an adapter has trained, apart from the network: save it alone, load it again, fold it in.

    save_adapter(model, folder)      only what trains: megabytes, where the network has gigabytes
    load_adapter(model, folder)      into a network with the same adapter applied
    merge_adapter(model)             a plain network with the same outputs, for inference

An adapter that PEFT made is kept in PEFT's format (adapter_config.json, adapter_model.safetensors), so that
`PeftModel.from_pretrained(network, folder)` reads it too. Every other one is `adapter.safetensors`: the trained
parameters under their names in the network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from velora.errors import ConfigError
from velora.nn.quantised import dense_linear, is_quantised

FILE = "adapter.safetensors"


def _is_peft(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Write the parameters that train to `folder`, and nothing of what is frozen; VeLoRA's directions are left out."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if _is_peft(model):
        parameters = dict(model.named_parameters(remove_duplicate=False))
        model.save_pretrained(str(folder), state_dict=parameters, save_embedding_layers=False)  # type: ignore[operator]
        return
    from safetensors.torch import save_file

    trained = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if p.requires_grad}
    save_file(trained, str(folder / FILE), metadata={"format": "pt"})


def save_network(model: nn.Module, folder: str | Path) -> None:
    """Write the whole network as plain layers would be: VeLoRA's directions are left out, so that any program reads it."""
    from velora.apply import velora_layers

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    own = {f"{name}.{buffer}" for name, layer in velora_layers(model).items() for buffer, _ in layer.named_buffers()}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in own}
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(str(folder), state_dict=state)  # type: ignore[operator]
        return
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(contiguous, str(folder / "model.safetensors"), metadata={"format": "pt"})


def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Read what `save_adapter` wrote into a network to which the same adapter has been applied, in place.

    Raises ConfigError where the file is missing or belongs to another adapter or network.
    """
    folder = Path(folder)
    file = folder / ("adapter_model.safetensors" if _is_peft(model) else FILE)
    if not file.is_file():
        raise ConfigError(
            f"{folder} holds no {file.name}: it is not a folder that an adapter of this kind was saved to"
        )
    from safetensors.torch import load_file

    state = load_file(str(file))
    if _is_peft(model):
        from peft import set_peft_model_state_dict

        expected = _peft_state(model)
        _compare(state, expected, file)
        set_peft_model_state_dict(model, state)
        return
    expected = {n: p for n, p in model.named_parameters() if p.requires_grad}
    _compare(state, expected, file)
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(state[name])


def merge_adapter(model: nn.Module) -> nn.Module:
    """Fold the adapter into the weights it stands beside and return the plain network; `model` must not be used on.

    The outputs in eval mode are those of the unmerged network, up to rounding to the weights' dtype. A layer in four bits that an
    adapter stands beside becomes dense, in its compute dtype; quantising the sum again would change the outputs.
    Layers that were made VeLoRA layers are plain ones afterwards.
    """
    from velora.apply import remove_velora

    remove_velora(model)
    if _is_peft(model):
        _merge_into_quantised(model)
        return model.merge_and_unload()  # type: ignore[operator]
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, "merged"):
                setattr(parent, name, child.merged())
    return model


def _peft_state(model: nn.Module) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(
        model, state_dict=dict(model.named_parameters(remove_duplicate=False)), save_embedding_layers=False
    )


def _compare(found: dict[str, Any], expected: dict[str, Any], file: Path) -> None:
    """ConfigError unless names and shapes agree."""
    wrong = sorted(found.keys() ^ expected.keys())
    wrong += [n for n in found.keys() & expected.keys() if found[n].shape != expected[n].shape]
    if wrong:
        raise ConfigError(
            f"{file} belongs to another adapter or network: {len(wrong)} of its parameters do not fit, {wrong[0]} among them"
        )


@torch.no_grad()
def _merge_into_quantised(model: nn.Module) -> None:
    """Replace PEFT's LoRA layers over 4-bit weights by the dense sum W + B A; PEFT itself would quantise the sum again."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            base = getattr(layer, "base_layer", None)
            if base is None or not is_quantised(base):
                continue
            dense = dense_linear(base)
            for adapter in layer.active_adapters:
                dense.weight.add_(layer.get_delta_weight(adapter).to(dense.weight.dtype))
            setattr(parent, name, dense)
