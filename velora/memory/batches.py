"""A batch of the shapes that a task has, and its loss as the training loop computes it: of the data only shapes count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from velora.config.run import Config

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def synthetic_batch(
    config: Config, batch_size: int, padded: bool = False, make: Callable[..., Tensor] = torch.ones
) -> dict[str, Tensor]:
    """Sequences of full length, all words 1 (which pads in no tokenizer that counts), all labels 1, no masked position.

    `padded` masks the last position of the first sequence, which makes networks build the attention masks that they leave
    out where nothing is masked. `make` makes the floating-point tensors: fake ones in an estimate.
    """
    batch: dict[str, Tensor] = {}
    for name, (shape, dtype_name) in config.task.batch_shapes(batch_size, config).items():
        dtype = getattr(torch, dtype_name)
        batch[name] = make(shape, dtype=dtype) if dtype.is_floating_point else torch.ones(shape, dtype=dtype)
    if padded and "attention_mask" in batch:
        batch["attention_mask"][0, -1] = 0
    return batch


def training_loss(network: nn.Module, batch: dict[str, Tensor], config: Config) -> Callable[[], Tensor]:
    """One forward in trainer.precision; the outputs are brought to float32 outside autocast, as accelerate does it."""
    dtype = _AUTOCAST.get(config.trainer.precision)

    def forward() -> Tensor:
        if dtype is None:
            return network(**batch).loss
        device = next(network.parameters()).device.type
        with torch.autocast(device, dtype=dtype):
            outputs = network(**batch)
        return type(outputs)({name: _to_float32(value) for name, value in outputs.items()}).loss

    return forward


class _NoTokenizer:
    """In place of a tokenizer whose vocabulary the architecture states anyway."""

    bos_token_id = eos_token_id = pad_token_id = 0


def preprocessor_for_shapes(config: Config) -> Any:
    """The preprocessor of a network's builder; no tokenizer is loaded where the architecture states its vocabulary."""
    architecture = getattr(config.model, "architecture", None)
    if architecture is not None and architecture.get("vocab_size", 0) is not None:
        return _NoTokenizer()
    return config.model.preprocessor(config)


def _to_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
