"""Lean: a network with the same outputs and gradients that keeps less for backward, without a matrix product computed twice.

    apply_lean(model)              norms, activations, dropout, the layers that read them, and the head with its loss
    apply_lean(model, mlp=True)    the first products of each MLP are computed again in backward as well

Modules become their lean twins in place: classes change, parameters, names and state dicts stay. What each keeps is said
at the head of `velora/nn/lean_layers.py`, `lean_mlp.py`, `lean_conv.py` and `causal_lm.py`; how a layer does without its
input, in `recipe.py`.
Where torch.compile traces the network, the twins of single layers are the plain layers: its partitioner plans what is kept.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from velora.errors import ConfigError
from velora.nn.causal_lm import make_lean_causal_lm, make_plain_causal_lm
from velora.nn.conv import VeloraConv
from velora.nn.lean_conv import LeanBatchNorm, LeanConv, LeanMaxPool2d, LeanReLU, LeanReLUOfSigns
from velora.nn.lean_layers import (
    PLAIN_CLASS,
    LeanActivation,
    LeanDropout,
    LeanLayerNorm,
    LeanLinear,
    LeanRMSNorm,
    LeanTorchRMSNorm,
    plain_class_of,
)
from velora.nn.lean_mlp import LeanMLP, activation_of
from velora.nn.swap import unwrapped


@dataclass(frozen=True)
class LeanSummary:
    """How many modules of each kind apply_lean changed."""

    counts: dict[str, int]

    def __str__(self) -> str:
        return "lean: " + ", ".join(f"{num} {kind}" for kind, num in self.counts.items())


def apply_lean(model: nn.Module, *, mlp: bool = False) -> LeanSummary:
    """Make the modules of a network their lean twins, in place.

    Call it after adapters and `apply_velora`, before a DDP or FSDP2 wrapper. Outputs and gradients stay those of the plain
    network up to rounding, and random numbers are the same. A module with a forward of its own instance is left alone.

    Args:
        mlp: compute the products before each MLP's activation again in backward (gate and up; the first layer of a plain MLP).

    Raises ConfigError where the network has no module that could be leaner; the network is untouched then.
    """
    counts: Counter[str] = Counter()
    with unwrapped(model) as network:
        relu = LeanReLUOfSigns if any(isinstance(module, VeloraConv) for module in network.modules()) else LeanReLU
        for module in network.modules():
            if "forward" in vars(module):
                continue
            twin = _twin_of(module, mlp, relu)
            if twin is not None:
                kind, cls = twin
                module.__class__ = cls
                counts[kind] += 1
            elif make_lean_causal_lm(module):
                counts["head with its loss"] += 1
    if not set(counts) - {"linear layers", "convolutions"}:
        raise ConfigError(
            f"apply_lean: {type(model).__name__} has no norm, activation, dropout or head that could keep less; "
            "choose recompute=none, or recompute.lean=false with recompute=blocks"
        )
    return LeanSummary(dict(counts))


def remove_lean(model: nn.Module) -> None:
    """Make every lean module the plain one again, in place."""
    with unwrapped(model) as network:
        for module in network.modules():
            if PLAIN_CLASS in vars(type(module)):
                module.__class__ = plain_class_of(module)
            else:
                make_plain_causal_lm(module)


def _twin_of(module: nn.Module, mlp: bool, relu: Any) -> tuple[str, type] | None:
    """What a plain module is, in words, and the class of its twin; None for what has none. `relu`: the twin of a ReLU."""
    cls: Any = type(module)
    if cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return "convolutions", _twin(LeanConv, cls)
    if cls is nn.ReLU:
        return "activations", _twin(relu, cls)
    if cls is nn.MaxPool2d:
        return "poolings", _twin(LeanMaxPool2d, cls)
    if cls is nn.Linear:
        return "linear layers", _twin(LeanLinear, cls)
    if cls is nn.Dropout:
        return "dropouts", _twin(LeanDropout, cls)
    norm: Any = _norm_mixin(module)
    if norm is not None:
        return "norms", _twin(norm, cls)
    parts: Any = _mlp_mixin(module, mlp)
    if parts is not None:
        return "MLPs", _twin(parts, cls)
    if PLAIN_CLASS not in vars(cls) and activation_of(module) is not None:
        return "activations", _twin(LeanActivation, cls)
    return None


@functools.cache
def _twin(mixin: Any, plain: Any) -> Any:
    bases = (mixin,) if issubclass(mixin, plain) else (mixin, plain)
    return type(f"Lean{plain.__name__}", bases, {PLAIN_CLASS: plain, "__module__": __name__})


def _norm_mixin(module: nn.Module) -> type | None:
    from timm.layers.norm import LayerNorm as TimmLayerNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    cls = type(module)
    if cls is nn.LayerNorm or (cls is TimmLayerNorm and not module._fast_norm):
        return LeanLayerNorm
    if cls is nn.RMSNorm:
        return LeanTorchRMSNorm
    if cls in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        return LeanBatchNorm
    return LeanRMSNorm if _same_forward(cls, LlamaRMSNorm) else None


class _Gated(LeanMLP):
    first, activation, rest, again = ("gate_proj", "up_proj"), "act_fn", ("down_proj",), False


class _GatedAgain(_Gated):
    again = True


class _IntermediateAgain(LeanMLP):
    first, activation, rest, again = ("dense",), "intermediate_act_fn", (), True


class _TimmAgain(LeanMLP):
    first, activation, rest, again = ("fc1",), "act", ("drop1", "norm", "fc2", "drop2"), True


def _mlp_mixin(module: nn.Module, again: bool) -> type[LeanMLP] | None:
    from timm.layers.mlp import Mlp
    from transformers.models.bert.modeling_bert import BertIntermediate
    from transformers.models.llama.modeling_llama import LlamaMLP

    cls = type(module)
    found: type[LeanMLP] | None = None
    if _same_forward(cls, LlamaMLP):
        found = _GatedAgain if again else _Gated
    elif again and _same_forward(cls, BertIntermediate):
        found = _IntermediateAgain
    elif again and cls is Mlp:
        found = _TimmAgain
    return found if found and activation_of(getattr(module, found.activation)) is not None else None


def _same_forward(cls: Any, reference: Any) -> bool:
    """Whether a class computes what another one does: transformers' models repeat such code word by word."""
    if cls is reference:
        return True
    ours, theirs = (getattr(c.forward, "__code__", None) for c in (cls, reference))
    if ours is None or theirs is None or not issubclass(cls, nn.Module):
        return False
    return (ours.co_code, ours.co_names, ours.co_consts, ours.co_freevars) == (
        theirs.co_code, theirs.co_names, theirs.co_consts, theirs.co_freevars,
    )  # fmt: skip
