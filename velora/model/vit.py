"""Vision transformers of timm, with their preprocessing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PositiveInt

from velora.errors import ConfigError
from velora.group import Head, Modality, Model

if TYPE_CHECKING:
    from torch import Tensor, nn

    from velora.config import Config
    from velora.model._images import ImageTransform

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_NONE = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
_SUFFIXES = (".safetensors", ".npz")


class ViT(Model):
    """A vision transformer that timm knows by name.

    `timm_name`: architecture and, after the dot, the published weights. `overrides`: arguments of timm's class that change the
    architecture (embed_dim, depth, num_heads, patch_size). `path`: weights from a local file instead, .safetensors
    (timm's names, or a network saved by this program, or a folder with model.safetensors) or the original .npz.
    `normalization`: "timm" is what the weights were trained with; "imagenet" what several VTAB-1k repositories
    feed all the same; "none" leaves the pixels in 0..1.
    """

    kind: Literal["vit"]
    timm_name: str
    image_size: PositiveInt
    drop_path: float = Field(ge=0, lt=1)
    normalization: Literal["timm", "imagenet", "none"]
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
        if self.pretrained and self.path is None and self.overrides:
            yield (
                f"model.pretrained=true with model.overrides={self.overrides}: published weights do not fit a changed "
                "architecture; set model.pretrained=false or model.path"
            )

    def preprocessor(self, config: Config) -> ImageTransform:
        from timm.data import resolve_data_config
        from timm.models import get_pretrained_cfg

        from velora.model._images import ImageTransform

        self._check_name()
        if self.pretrained and self.path is None:
            self._fetch(get_pretrained_cfg(self.timm_name))
        found = resolve_data_config(pretrained_cfg=get_pretrained_cfg(self.timm_name).to_dict())
        mean, std = {"timm": (found["mean"], found["std"]), "imagenet": _IMAGENET, "none": _NONE}[self.normalization]
        return ImageTransform(self.image_size, found["interpolation"], tuple(mean), tuple(std))

    def build(self, head: Head, preprocessor: Any, config: Config) -> nn.Module:
        import timm
        from transformers import set_seed

        from velora.nn.image_classifier import ImageClassifier

        self._check_name()
        set_seed(config.seed)

        def create(pretrained: bool) -> nn.Module:
            return timm.create_model(
                self.timm_name, pretrained=pretrained, num_classes=head.num_labels, img_size=self.image_size,
                drop_path_rate=self.drop_path, **self.overrides,
            )  # fmt: skip

        if not self.pretrained:
            return ImageClassifier(create(False))
        if self.path is not None:
            vit = create(False)
            self._load_file(vit)
            return ImageClassifier(vit)
        return ImageClassifier(self._from_hub(lambda: create(True)))

    def _from_hub(self, function: Callable[[], Any]) -> Any:
        from velora.hub import load

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
        path = Path(self.path or "").expanduser()
        if path.is_dir():
            path = path / "model.safetensors"
        return path if path.is_file() and path.suffix in _SUFFIXES else None

    def _load_file(self, vit: nn.Module) -> None:
        """Copy the file's weights into the network; the head may be missing or of another size, nothing else."""
        file = self._file()
        assert file is not None  # `problems` saw to it
        try:
            if file.suffix == ".npz":
                vit.load_pretrained(str(file))  # type: ignore[operator]
                return
            state = _timm_state(file, vit)
        except (KeyError, RuntimeError, ValueError) as error:
            raise self._another(str(error).splitlines()[0]) from None
        heads = {
            k for k in state if k.startswith("head.") and state[k].shape != vit.state_dict().get(k, state[k]).shape
        }
        kept = {k: v for k, v in state.items() if k not in heads}
        expected = vit.state_dict()
        wrong = sorted(k for k in expected if not k.startswith("head.") and k not in kept)
        wrong += sorted(k for k in kept if k not in expected or kept[k].shape != expected[k].shape)
        if wrong:
            raise self._another(f"{len(wrong)} parameters are missing or do not fit, {wrong[0]} among them")
        vit.load_state_dict(kept, strict=False)

    def _another(self, reason: str) -> ConfigError:
        return ConfigError(
            f"model.path={self.path} is a checkpoint of another architecture ({reason}); choose the model= that belongs to it"
        )


def _timm_state(file: Path, vit: nn.Module) -> dict[str, Tensor]:
    """A state dict with timm's names, position embeddings resampled to the network's image size."""
    from safetensors.torch import load_file
    from timm.models.vision_transformer import checkpoint_filter_fn

    state = load_file(str(file))
    own = all(k.startswith("vit.") for k in state)
    state = {k.removeprefix("vit."): v for k, v in state.items()} if own else state
    return checkpoint_filter_fn(state, vit)
