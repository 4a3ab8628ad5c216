"""A causal language model that makes its loss without logits and the plain one of the same weights."""

from __future__ import annotations

import copy

import torch
from tiny import tiny_llama, token_batch
from torch import Tensor, nn

from velora.nn.causal_lm import make_lean_causal_lm

ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-9}
EXTRA_BYTES = 1 + 8
"""What the loss keeps beside gradients: the mask `any label counts`, and the number that divides, an int64."""


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def lean_and_plain(dtype: torch.dtype = torch.float32, **overrides: object) -> tuple[nn.Module, nn.Module]:
    plain = tiny_llama(**overrides).to(dtype)
    lean = copy.deepcopy(plain)
    assert make_lean_causal_lm(lean)
    return lean, plain


def batch_of(num_sequences: int = 3, length: int = 7, seed: int = 0, num_ignored: int = 4) -> dict[str, Tensor]:
    batch = token_batch(num_sequences, length, seed)
    batch["labels"] = batch["labels"].clone()
    batch["labels"].view(-1)[torch.arange(num_ignored) * 3] = -100
    return batch


def assert_same_training(
    lean: nn.Module, plain: nn.Module, dtype: torch.dtype = torch.float32, **inputs: object
) -> None:
    """One forward and backward of each. 64 roundings: the difference at the head goes through two blocks backwards."""
    outputs, expected = lean(**inputs), plain(**inputs)
    assert outputs.logits is None
    assert expected.logits is not None
    assert outputs.loss.dtype == expected.loss.dtype
    torch.testing.assert_close(outputs.loss, expected.loss, rtol=64 * ROUNDING[dtype], atol=0)
    outputs.loss.backward()
    expected.loss.backward()
    for (name, mine), (_, theirs) in zip(lean.named_parameters(), plain.named_parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None) == (not mine.requires_grad), name
        if theirs.grad is not None:
            tolerance = 64 * ROUNDING[dtype] * theirs.grad.abs().max().item()
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=tolerance, msg=name)


def assert_close_to_largest(mine: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(mine, theirs, rtol=0, atol=64 * ROUNDING[torch.float32] * theirs.abs().max().item())
