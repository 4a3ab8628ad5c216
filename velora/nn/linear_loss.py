"""The cross-entropy of a linear layer's outputs, without ever having the outputs of all tokens.

A language model's head multiplies N tokens by V words, and the plain loss keeps those N V logits for backward, twice. But
the gradient of the loss by its logits is known as soon as the logits are:

    l    = h Wᵀ + b                        (n, V)   of n tokens, a chunk
    loss = Σ log Σ exp l - l[label]
    dl   = softmax(l) - onehot(label)      (n, V)   in the place of l; zero where the label is ignored
    dh   = dl W                            (n, D)
    dW  += dlᵀ h                           (V, D)

So one pass over the chunks does everything, no product is computed twice, and what is kept for backward is dh (N D) and, where
it trains, dW (V D) and db; h is not. They are the gradients of the *sum* of the losses: the mean's denominator is applied to the
result, and backward multiplies by what comes from there. In half precision they do not underflow therefore, as dl / N would.
Backward scales in place, unless the graph is to be used again.

Logits, losses and the sums in dW are float32 at least; products are in the dtype of their factors, as autocast wants them.

torch >= 2.13 has an F.linear_cross_entropy of its own. It is not used. With D = 512, V = 32,000, N = 1024 and float32 (CPU time of
forward and backward on one thread, medians of three, relative to the plain loss) it takes 1.50 with the size of chunk that it
chooses, and with chunks of 256 and 512 tokens 0.90 and 0.87; this one takes 0.89 and 0.87. Both keep the same 66.5 MiB, the plain
loss 127. But it cannot be used twice without a copy of all gradients, knows no autocast, and what it allocates is out of
sight of this package's memory figures.

    N  tokens      n  tokens in a chunk      D  features of a token      V  words
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from velora.nn.first_order import refuse_second_derivative
from velora.nn.projection import _without_autocast, sum_over_tokens
from velora.nn.recipe import autocast_dtype, cast

_NO_SECOND_DERIVATIVE = (
    "linear_cross_entropy has no second derivative: its gradients are made in the forward. Where one is needed take the "
    "plain loss: velora.remove_lean(model), or model.eval()"
)
_HALVES = (torch.float16, torch.bfloat16)
_CHUNK_NUMBERS, _FEWEST_TOKENS = 2**23, 256  # 32 MiB of float32 logits; products of fewer tokens are slow
_WORDS_AT_A_TIME = 2**13  # of float32 sums beside a half-precision dW


def tokens_in_chunk(num_words: int) -> int:
    """n, for a vocabulary."""
    return max(_FEWEST_TOKENS, _CHUNK_NUMBERS // num_words // 64 * 64)


@torch.compiler.disable
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    num_items: Tensor | int | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """F.cross_entropy(F.linear(hidden, weight, bias).float(), labels), a scalar in float32 (float64 for float64).

    hidden (..., D), weight (V, D), bias (V) or None, labels (...) of int64 on any device. The sum over the labels that are not
    `ignore_index` is divided by their number, or by `num_items`, as transformers divides by the number in all micro-batches.
    Where all labels are ignored the mean is NaN and the gradients are zero, as the plain one's. `chunk_size`: n.

    A second derivative is refused by a RuntimeError. torch.compile breaks its graph here.
    """
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1, 1).to(hidden.device)
    if hidden.shape[0] != labels.shape[0]:
        raise ValueError(f"{labels.shape[0]} labels for {hidden.shape[0]} tokens: each token needs one")
    dtype = autocast_dtype(hidden.device)
    hidden = cast(hidden, dtype)
    wanted = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias))
    counted = labels != ignore_index
    size = chunk_size or tokens_in_chunk(weight.shape[0])
    total = _SumOfLosses.apply(hidden, weight, bias, labels.masked_fill(~counted, 0), counted, dtype, wanted, size)
    total = total.masked_fill(~counted.any(), 0.0)  # no gradient where nothing counts, whatever it is divided by
    if isinstance(num_items, Tensor):
        num_items = num_items.to(total.device)
    return total / (counted.sum() if num_items is None else num_items)


class _SumOfLosses(torch.autograd.Function):
    """Keeps the gradients of the sum; see the head of this file."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        counted: Tensor,
        cast_to: torch.dtype | None,
        wanted: tuple[bool, bool, bool],
        chunk_size: int,
    ) -> Tensor:
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        w, b = cast(weight, cast_to), None if bias is None else cast(bias, cast_to)
        with _without_autocast(hidden.device):
            loss, gradients = _in_chunks(hidden, w, b, labels, counted, wanted, chunk_size)
        # a sum over tokens may be beyond float16, and has room in all others
        kept = [
            gradient if gradient is None or dtype == torch.float16 else gradient.to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        ctx.save_for_backward(*kept)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        used_up = not torch._C._autograd._get_current_graph_task_keep_graph()
        # one axis: a number without would be rounded to the half of the other factor
        factor = grad_outputs[0].detach().view(1)
        scaled: list[Tensor | None] = []
        for kept, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
            if kept is None:
                scaled.append(None)
                continue
            result = kept if used_up and kept.dtype == dtype else torch.empty_like(kept, dtype=dtype)
            scaled.append(torch.mul(kept, factor, out=result))
        return *refuse_second_derivative(scaled, _NO_SECOND_DERIVATIVE), None, None, None, None, None


def _in_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    counted: Tensor,
    wanted: tuple[bool, bool, bool],
    chunk_size: int,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """The sum of the losses, and its gradients where they are wanted: dh (N, D) as h, dW (V, D) and db (V) in float32."""
    (num_tokens, width), num_words = hidden.shape, weight.shape[0]
    dtype = hidden.dtype
    wide = torch.promote_types(dtype, torch.float32)
    losses = hidden.new_empty(num_tokens, 1, dtype=wide)
    dh = hidden.new_empty(num_tokens, width) if wanted[0] else None
    dw = hidden.new_zeros(num_words, width, dtype=wide) if wanted[1] else None
    db = hidden.new_zeros(num_words, dtype=wide) if wanted[2] else None
    buffer = hidden.new_empty(min(chunk_size, num_tokens), num_words)
    wide_buffer = buffer if dtype == wide else buffer.new_empty(buffer.shape, dtype=wide)
    for start in range(0, num_tokens, chunk_size):
        rows = slice(start, start + chunk_size)
        h = hidden[rows]  # (n, D)
        products, logits = buffer[: h.shape[0]], wide_buffer[: h.shape[0]]  # (n, V)
        _product(h, weight, bias, out=products)
        if dtype != wide:
            logits.copy_(products)
        _losses_and_their_gradient(logits, labels[rows], counted[rows], out=losses[rows])
        if db is not None:
            db += logits.sum(0)
        if dh is None and dw is None:
            continue
        if dtype != wide:
            products.copy_(logits)
        if dh is not None:
            torch.mm(products, weight, out=dh[rows])
        if dw is not None:
            _add_over_tokens(dw, products, h)
    return losses.sum(), (dh, dw, db)


def _product(h: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(h, weight.T, out=out)
    else:
        torch.addmm(bias, h, weight.T, out=out)


def _losses_and_their_gradient(logits: Tensor, labels: Tensor, counted: Tensor, out: Tensor) -> None:
    """Write the losses (n, 1) to `out` and their gradient over the logits (n, V); zero for tokens that do not count."""
    counts = counted.to(logits.dtype)  # (n, 1)
    logits -= logits.amax(1, keepdim=True)
    chosen = logits.gather(1, labels)
    total = logits.exp_().sum(1, keepdim=True)
    torch.mul(total.log() - chosen, counts, out=out)
    logits *= counts / total
    logits.scatter_add_(1, labels, -counts)


def _add_over_tokens(sums: Tensor, a: Tensor, b: Tensor) -> None:
    """sums (P, Q) += aᵀ b, of a (n, P) and b (n, Q); where they are halves a part of the sums at a time."""
    if a.dtype not in _HALVES:
        torch.addmm(sums, a.T, b, out=sums)
        return
    for some, words in zip(sums.split(_WORDS_AT_A_TIME), a.split(_WORDS_AT_A_TIME, 1), strict=True):
        some += sum_over_tokens(words, b)
