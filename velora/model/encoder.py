"""Text encoders with a classification head: RoBERTa-base, or any sequence-classification network by folder or name."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from velora.group import Head, Modality
from velora.model._pretrained import PretrainedModel


class Encoder(PretrainedModel):
    kind: Literal["encoder"]

    head_prefixes: ClassVar[tuple[str, ...]] = ("classifier.", "score.", "pre_classifier.", "pooler.", "bert.pooler.")

    def modalities(self) -> tuple[Modality, ...]:
        return ("sequence_classification",)

    def auto_class(self, head: Head) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification
