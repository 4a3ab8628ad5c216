"""What CUDA does otherwise than the CPU, as far as it changes memory, for an estimate without a CUDA device.

Fake tensors of device "cuda" cannot run a backward on a machine without one, so the estimate runs fake CPU tensors. Five
things are then made as CUDA makes them:

- dropout keeps a mask of one byte per element (the CPU keeps one of the input's type);
- products of halves that ask for a float32 result need no cast copies (`sum_over_tokens`);
- fused attention keeps no matrix of probabilities, with dropout either (the CPU has no fused kernel with dropout);
- autocast computes normalisations, softmaxes, losses, powers and sums in float32 (the CPU's leaves most of them in half);
- optimizers without a fused form update all tensors together (`foreach`), with temporaries as large as all of them.

The caching allocator's rounding to 512 bytes is the timeline's part. What operators use inside themselves (workspaces of
cuBLAS and cuDNN) and what CUDA itself takes (some hundred MiB per process) is in no figure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from velora.nn.projection import sum_over_tokens

# https://docs.pytorch.org/docs/stable/amp.html, "CUDA Ops that can autocast to float32", by the names Python calls them
# fmt: off
_IN_FLOAT32 = {
    "__pow__", "__rdiv__", "__rpow__", "__rtruediv__", "acos", "asin", "binary_cross_entropy_with_logits", "cosh",
    "cosine_embedding_loss", "cdist", "cosine_similarity", "cross_entropy", "cumprod", "cumsum", "dist", "erfinv", "exp",
    "expm1", "group_norm", "hinge_embedding_loss", "kl_div", "l1_loss", "layer_norm", "log", "log10", "log_softmax",
    "log1p", "log2", "margin_ranking_loss", "mse_loss", "multilabel_margin_loss", "multi_margin_loss", "nll_loss",
    "norm", "normalize", "pdist", "poisson_nll_loss", "pow", "prod", "reciprocal", "rsqrt", "sinh", "smooth_l1_loss",
    "soft_margin_loss", "softmax", "softmin", "softplus", "sum", "renorm", "tan", "triplet_margin_loss",
}
# fmt: on
_HALF = (torch.float16, torch.bfloat16)


class AsOnCuda(TorchFunctionMode):
    """While entered, dropout and autocast on CPU tensors keep and compute what they would on CUDA."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.autograd.backward:
            with self:  # for what checkpointed regions compute again
                return _backward(*args, **kwargs)
        if func is torch.nn.functional.dropout:
            return _dropout(*args, **kwargs)
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is sum_over_tokens and args[0].dtype in _HALF:
            return _float32_of_halves(*args)
        if torch.is_autocast_enabled("cpu") and getattr(func, "__name__", "") in _IN_FLOAT32:
            args = tuple(_in_float32(value) for value in args)
            kwargs = {name: _in_float32(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _backward(tensors: Any, grad_tensors: Any = None, **_options: Any) -> None:
    """torch.autograd.backward without its own look at function modes, inside which they would all be off."""
    tensors = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
    gradients = (None,) * len(tensors) if grad_tensors is None else tuple(grad_tensors)
    starts = tuple(torch.ones_like(t) if g is None else g for t, g in zip(tensors, gradients, strict=True))
    engine = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
    engine.run_backward(tensors, starts, False, False, (), allow_unreachable=True, accumulate_grad=True)


def _in_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _HALF else value


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or p == 0.0:
        return input
    return torch.native_dropout(input, p, True)[0]


def _float32_of_halves(a: Tensor, b: Tensor) -> Tensor:
    """One product with a float32 result, and no cast copy: only the size counts."""
    return a.new_empty(*a.shape[:-2], a.shape[-1], b.shape[-1], dtype=torch.float32)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **options: Any
) -> Tensor:
    """The fused kernels of CUDA draw their dropout anew in backward: what they keep does not depend on it."""
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask, 0.0, **options)


def use_foreach(optimizer: torch.optim.Optimizer) -> None:
    """Let torch's own optimizers choose as they do on CUDA, where `foreach` is the default."""
    for group in optimizer.param_groups:
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = True
