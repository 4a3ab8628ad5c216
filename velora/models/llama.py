"""Decoder-only language models: the LLaMA sizes of the GaLore paper from scratch, any causal LM from a folder or a hub."""

from __future__ import annotations

from typing import Any, Literal

from velora.config.parts import Head, Modality
from velora.models.pretrained import PretrainedModel


class Llama(PretrainedModel):
    kind: Literal["llama"]

    def modalities(self) -> tuple[Modality, ...]:
        return ("causal_lm",)

    def auto_class(self, head: Head) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM
