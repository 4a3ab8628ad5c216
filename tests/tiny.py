"""Tiny networks with random weights, from the configurations of transformers and timm: quick, and no download."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 64


def tiny_llama(seed: int = 0, **overrides: Any) -> nn.Module:
    """Two LLaMA blocks, hidden 32, MLP 48, 4 heads of 8; language modelling over 64 words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **tokens, **(sizes | overrides))
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).train()


def tiny_roberta(seed: int = 0, num_labels: int = 2, **overrides: Any) -> nn.Module:
    """Two RoBERTa blocks, hidden 32, MLP 64, 4 heads of 8, no dropout; sequence classification."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    settings = tokens | sizes | dropout | overrides
    config = RobertaConfig(vocab_size=VOCABULARY, max_position_embeddings=66, num_labels=num_labels, **settings)
    torch.manual_seed(seed)
    return RobertaForSequenceClassification(config).train()


def tiny_vit(seed: int = 0, num_classes: int = 4, **overrides: Any) -> nn.Module:
    """Two ViT blocks of timm, width 32, MLP 64, 4 heads of 8; images of 3 x 16 x 16 in patches of 8."""
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2.0}
    torch.manual_seed(seed)
    return VisionTransformer(num_classes=num_classes, **(sizes | overrides)).train()


def token_batch(
    num_sequences: int = 2, length: int = 8, seed: int = 0, num_labels: int | None = None
) -> dict[str, Tensor]:
    """Random words; labels are the words themselves, or one class per sequence where `num_labels` is given."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, VOCABULARY, (num_sequences, length), generator=generator)
    labels = words if num_labels is None else torch.randint(num_labels, (num_sequences,), generator=generator)
    return {"input_ids": words, "labels": labels}


def image_batch(num_images: int = 2, seed: int = 0) -> Tensor:
    """Random images (num_images, 3, 16, 16)."""
    return torch.randn(num_images, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
