"""Vision transformers of timm, with their preprocessing."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PositiveInt

from velora.config.parts import Head, Modality, Model
from velora.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from velora.config.run import Config
    from velora.models.images import ImageTransform

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_NONE = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
_SUFFIXES = (".safetensors", ".npz")


class ViT(Model):
    """A vision transformer that timm knows by name.

    `timm_name`: architecture and, after the dot, the published weights. `overrides`: arguments of timm's class that change the
    architecture (embed_dim, depth, num_heads, patch_size). `path`: weights from a local file instead, .safetensors
    (timm's names, or a network saved by this program, or a folder with model.safetensors) or the original .npz.
    `normalization`: "timm" is what the weights were trained with; "imagenet" what several VTAB-1k repositories
    feed all the same; "none" leaves the pixels in 0..1. `split_qkv`: query, key and value as three layers in place of timm's
    one, with the same result up to rounding and the same saved weights; see velora/nn/split_qkv.py.
    """

    kind: Literal["vit"]
    timm_name: str
    image_size: PositiveInt
    drop_path: float = Field(ge=0, lt=1)
    normalization: Literal["timm", "imagenet", "none"]
    split_qkv: bool
    overrides: dict[str, Any]

    def modalities(self) -> tuple[Modality, ...]:
        return ("image_classification",)

    def problems(self, config: Config) -> Iterator[str]:
        patch = self.overrides.get("patch_size") or next(iter(re.findall(r"patch(\d+)", self.timm_name)), None)
        if patch is not None and not str(patch).isdecimal():
            yield f"model.overrides.patch_size={patch} is not valid: it must be an integer"
        elif patch is not None and self.image_size % int(patch):
            yield f"model.image_size={self.image_size} is no multiple of the patch size {patch} of model={self.name}"
        if self.path is not None and self._file() is None:
            yield (
                f"model.path={self.path} is no file with weights: give a .safetensors or .npz file, or a folder with "
                "model.safetensors"
            )
        if self.path is not None and self.pretrained is False:
            yield (
                f"model.path={self.path} with model.pretrained=false: the weights in it would not be read; leave one of the two out"
            )
        if self.pretrained and self.path is None and self.overrides:
            yield (
                f"model.pretrained=true with model.overrides={self.overrides}: published weights do not fit a changed "
                "architecture; set model.pretrained=false or model.path"
            )

    def preprocessor(self, config: Config) -> ImageTransform:
        from timm.data import resolve_data_config
        from timm.models import get_pretrained_cfg

        from velora.models.images import ImageTransform

        self._check_name()
        if self.loads_weights and self.path is None:
            self._fetch(get_pretrained_cfg(self.timm_name))
        found = resolve_data_config(pretrained_cfg=get_pretrained_cfg(self.timm_name).to_dict())
        mean, std = {"timm": (found["mean"], found["std"]), "imagenet": _IMAGENET, "none": _NONE}[self.normalization]
        return ImageTransform(self.image_size, found["interpolation"], tuple(mean), tuple(std))

    def build(self, head: Head, preprocessor: Any, config: Config) -> nn.Module:
        from velora.nn.image_classifier import ImageClassifier
        from velora.nn.split_qkv import split_qkv

        vit = self._build_timm(head, config)
        if self.split_qkv:
            split_qkv(vit)
        return ImageClassifier(vit)

    def _build_timm(self, head: Head, config: Config) -> nn.Module:
        import timm
        from transformers import set_seed

        self._check_name()
        set_seed(config.seed)

        def create(pretrained: bool) -> nn.Module:
            try:
                return timm.create_model(
                    self.timm_name, pretrained=pretrained, num_classes=head.num_labels, img_size=self.image_size,
                    drop_path_rate=self.drop_path, **self.overrides,
                )  # fmt: skip
            except TypeError as error:  # timm passes what it does not know on to a class that refuses it
                reason = str(error).rpartition("__init__() ")[2]
                raise ConfigError(
                    f"model.overrides={self.overrides}: model.timm_name={self.timm_name} {reason}"
                ) from None

        if not self.loads_weights:
            return create(False)
        if self.path is None:
            return self._from_hub(lambda: create(True))
        vit = create(False)
        self._load_file(vit)
        return vit

    def _from_hub(self, function: Callable[[], Any]) -> Any:
        from velora.models.hub import load

        what = f"the weights {self.timm_name} of model={self.name}"
        return load(what, "give model.path=FILE (.safetensors or .npz)", function)

    def _fetch(self, published: Any) -> None:
        """Have the weights in the hub's cache, or fail now and not after the images have been read."""
        from huggingface_hub import snapshot_download

        if published.hf_hub_id:
            kinds = ["*.safetensors", "*.json"]
            self._from_hub(lambda: snapshot_download(published.hf_hub_id, allow_patterns=kinds))

    def _check_name(self) -> None:
        from timm.models import is_model

        if not is_model(self.timm_name):
            raise ConfigError(
                f"model.timm_name={self.timm_name} is not a network of timm; see timm.list_models('vit*')"
            )

    def _file(self) -> Path | None:
        path = os.path.expanduser(self.path or "")
        if os.path.isdir(path):  # those of pathlib raise for a name that is too long
            path = os.path.join(path, "model.safetensors")
        return Path(path) if os.path.isfile(path) and path.endswith(_SUFFIXES) else None

    def _load_file(self, vit: nn.Module) -> None:
        """Copy the file's weights into the network; the head may be missing or of another size, nothing else."""
        file = self._file()
        assert file is not None  # `problems` saw to it
        npz = file.suffix == ".npz"
        try:
            state = _npz_shapes(file) if npz else _safetensors(file)
        except MemoryError:
            raise
        except Exception as error:  # of zipfile, zlib, NumPy and safetensors, which raise half a dozen types
            raise ConfigError(
                f"model.path={self.path} cannot be read as weights ({_first_line(error)}): "
                f"give a whole {' or '.join(_SUFFIXES)} file"
            ) from None
        try:
            _copy_npz(file, state, vit) if npz else _copy_state(state, vit)
        except MemoryError:
            raise
        except Exception as error:  # timm's conversions find other names and shapes in as many ways
            raise ConfigError(
                f"model.path={self.path} is a checkpoint of another architecture ({_first_line(error)}); "
                "choose the model= that belongs to it"
            ) from None
        for name, value in vit.state_dict().items():
            if not value.isfinite().all():
                raise ConfigError(f"model.path={self.path} holds NaN or inf (in {name}): give an undamaged checkpoint")


def _first_line(error: Exception) -> str:
    text = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {text}" if isinstance(error, KeyError) or not text else text


def _safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(str(file))


def _npz_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each array, all of which were read (their checksums hold, and none is a pickle)."""
    import numpy as np

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


def _copy_state(state: dict[str, Tensor], vit: nn.Module) -> None:
    """timm's names, or those of a network saved by this program; position embeddings are resampled to the image size."""
    from timm.models.vision_transformer import checkpoint_filter_fn

    own = all(k.startswith("vit.") for k in state)
    state = {k.removeprefix("vit."): v for k, v in state.items()} if own else state
    state = checkpoint_filter_fn(state, vit)
    expected = vit.state_dict()

    def fits(name: str) -> bool:
        found, wanted = state.get(name), expected[name]
        return found is not None and (found.shape, found.is_floating_point()) == (
            wanted.shape,
            wanted.is_floating_point(),
        )

    if not all(fits(name) for name in expected if name.startswith("head.")):  # another task's head, or none
        state = {k: v for k, v in state.items() if not k.startswith("head.")}
    wrong = sorted(k for k in expected if not k.startswith("head.") and not fits(k))
    wrong += sorted(k for k in state if k not in expected)
    if wrong:
        raise ValueError(f"{len(wrong)} parameters are missing or do not fit, {wrong[0]} among them")
    vit.load_state_dict(state, strict=False)
