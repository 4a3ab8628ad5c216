"""Vision transformers of timm, with their preprocessing; and what they share with timm's other networks (convnet.py)."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
from torch import Tensor, nn

from velora.config.model import TimmModel, ViT
from velora.config.parts import Head
from velora.errors import ConfigError
from velora.models import hub
from velora.models.images import ImageTransform
from velora.nn.image_classifier import ImageClassifier
from velora.nn.split_qkv import split_qkv

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_NONE = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def image_transform(model: TimmModel) -> ImageTransform:
    """The preprocessing that belongs to the weights. Published weights are fetched here, before any image is read."""
    _check_name(model)
    published = timm.get_pretrained_cfg(model.timm_name)
    assert published is not None
    if model.loads_weights and model.path is None and published.hf_hub_id:
        from huggingface_hub import snapshot_download

        kinds = ["*.safetensors", "*.json"]
        _from_hub(model, lambda: snapshot_download(published.hf_hub_id, allow_patterns=kinds))
    found = timm.data.resolve_data_config(pretrained_cfg=published.to_dict())
    mean, std = {"timm": (found["mean"], found["std"]), "imagenet": _IMAGENET, "none": _NONE}[model.normalization]
    return ImageTransform(model.image_size, found["interpolation"], tuple(mean), tuple(std))


def build(model: ViT, head: Head, seed: int) -> nn.Module:
    """The network with a head for the task, on the CPU."""
    vit = timm_network(model, head, seed, "vit.", img_size=model.image_size)
    if model.split_qkv:
        split_qkv(vit)
    return ImageClassifier(vit)


def timm_network(model: TimmModel, head: Head, seed: int, prefix: str, **options: Any) -> nn.Module:
    """timm's network with a head for the task and the weights that are asked for; `prefix`: what its names have in front of them
    in a network saved by this program."""
    from transformers import set_seed

    _check_name(model)
    set_seed(seed)
    published = model.loads_weights and model.path is None
    make = partial(_create, model, head, published, options)
    network = _from_hub(model, make) if published else make()
    if model.loads_weights and not published:
        _load_file(model, network, prefix)
    return network


def _create(model: TimmModel, head: Head, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    try:
        return timm.create_model(
            model.timm_name, pretrained=pretrained, num_classes=head.num_labels, drop_path_rate=model.drop_path,
            **options, **model.overrides,
        )  # fmt: skip
    except (
        TypeError,
        AssertionError,
        IndexError,
    ) as error:  # timm passes what it does not know on to a class that refuses it
        reason = str(error).rpartition("__init__() ")[2] or "does not take them"
        raise ConfigError(f"model.overrides={model.overrides}: model.timm_name={model.timm_name} {reason}") from None


def _from_hub(model: TimmModel, function: Callable[[], Any]) -> Any:
    what = f"the weights {model.timm_name} of model={model.name}"
    return hub.load(what, f"give model.path=FILE ({' or '.join(model.files)})", function)


def _check_name(model: TimmModel) -> None:
    if not timm.is_model(model.timm_name):
        raise ConfigError(
            f"model.timm_name={model.timm_name} is not a network of timm; see timm.list_models('{model.kind[:4]}*')"
        )


def _load_file(model: TimmModel, network: nn.Module, prefix: str) -> None:
    """Copy the file's weights into the network; the head may be missing or of another size, nothing else."""
    file = model.weights_file()
    assert file is not None  # `problems` saw to it
    npz = file.suffix == ".npz"
    try:
        state = _npz_shapes(file) if npz else _safetensors(file)
    except MemoryError:
        raise
    except Exception as error:  # of zipfile, zlib, NumPy and safetensors, which raise half a dozen types
        raise ConfigError(
            f"model.path={model.path} cannot be read as weights ({_first_line(error)}): "
            f"give a whole {' or '.join(model.files)} file"
        ) from None
    try:
        _copy_npz(file, state, network) if npz else _copy_state(state, network, prefix)
    except MemoryError:
        raise
    except Exception as error:  # timm's conversions find other names and shapes in as many ways
        raise ConfigError(
            f"model.path={model.path} is a checkpoint of another architecture ({_first_line(error)}); "
            "choose the model= that belongs to it"
        ) from None
    for name, value in network.state_dict().items():
        if not value.isfinite().all():
            raise ConfigError(f"model.path={model.path} holds NaN or inf (in {name}): give an undamaged checkpoint")


def _first_line(error: Exception) -> str:
    text = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {text}" if isinstance(error, KeyError) or not text else text


def _safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(str(file))


def _npz_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each array, all of which were read (their checksums hold, and none is a pickle)."""
    with open(file, "rb") as stream:
        found = np.load(stream, allow_pickle=False)
        if not isinstance(found, np.lib.npyio.NpzFile):
            raise ValueError("it is a single array")
        return {name: found[name].shape for name in found.files}


def _copy_npz(file: Path, shapes: dict[str, tuple[int, ...]], vit: Any) -> None:
    """timm's conversion of the original format, which itself passes over further layers and another number of heads."""
    vit.load_pretrained(str(file))
    numbers = {int(found[1]) for name in shapes if (found := re.search(r"encoderblock_(\d+)/", name))}
    stacked = {shape[0] for name, shape in shapes.items() if "/encoderblock/LayerNorm_0/scale" in name}
    heads = {shape[-2] for name, shape in shapes.items() if name.endswith("/query/kernel") and "block" in name}
    theirs = (max(numbers, default=-1) + 1 or max(stacked, default=0), max(heads, default=0))
    ours = (len(vit.blocks), vit.blocks[0].attn.num_heads)
    if theirs != ours:
        raise ValueError(
            f"it has {theirs[0]} layers with {theirs[1]} attention heads, the network {ours[0]} with {ours[1]}"
        )


def _copy_state(state: dict[str, Tensor], network: Any, prefix: str) -> None:
    """timm's names, or those of a network saved by this program; timm's own conversion of older names and other image sizes."""
    own = all(k.startswith(prefix) for k in state)
    state = {k.removeprefix(prefix): v for k, v in state.items()} if own else state
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    state = state if convert is None else convert(state, network)
    expected = network.state_dict()
    head = f"{network.default_cfg['classifier']}."

    def fits(name: str) -> bool:
        found, wanted = state.get(name), expected[name]
        return found is not None and (found.shape, found.is_floating_point()) == (
            wanted.shape,
            wanted.is_floating_point(),
        )

    if not all(fits(name) for name in expected if name.startswith(head)):  # another task's head, or none
        state = {k: v for k, v in state.items() if not k.startswith(head)}
    wrong = sorted(k for k in expected if not k.startswith(head) and not fits(k))
    wrong += sorted(k for k in state if k not in expected)
    if wrong:
        raise ValueError(f"{len(wrong)} parameters are missing or do not fit, {wrong[0]} among them")
    network.load_state_dict(state, strict=False)
