"""Text encoders with a classification head: RoBERTa-base, or any sequence-classification network by folder or name."""

from __future__ import annotations

from typing import Any, Literal

from velora.config.parts import Head, Modality
from velora.models.pretrained import PretrainedModel


class Encoder(PretrainedModel):
    kind: Literal["encoder"]

    def modalities(self) -> tuple[Modality, ...]:
        return ("sequence_classification",)

    def auto_class(self, head: Head) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification
