"""A causal language model of transformers that computes its training loss without the logits.

The twin has the plain class's name, parameters, state dict and signature, and is made in place by changing the class, as those of
velora/nn/twin.py. Only one thing differs: in training, with labels and gradients on, the head and the loss are computed together
(velora/nn/linear_loss.py), and the output's `logits` are None. Whatever needs the logits gets the plain forward:

- eval mode, no gradients, no labels, `logits_to_keep`, or a tuple as output, in which the logits have their place;
- a head that is more than a linear layer (LoRA, 4-bit, VeLoRA, parametrisations), or that has hooks;
- a loss other than that of transformers' causal language models.

    B  sequences      T  words in one      D  width
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from velora.nn.linear_loss import linear_cross_entropy

_FAMILIES = (
    "Apertus", "Exaone4", "Gemma", "Glm", "Helium", "Llama", "Ministral", "Mistral", "Olmo",
    "Olmo2", "Olmo3", "Phi", "Phi3", "Qwen2", "Qwen3", "SeedOss", "SmolLM3", "Starcoder2",
)  # fmt: skip
LEAN_CLASSES = frozenset(f"{family}ForCausalLM" for family in _FAMILIES)
"""Classes of transformers whose forward is LLaMA's: self.model, then self.lm_head, then self.loss_function, nothing between."""


_BY_POSITION_OR_NAME = inspect.Parameter.POSITIONAL_OR_KEYWORD


class LeanCausalLM:
    """Mixin of the twins; it stands before the plain class."""

    saved_term: ClassVar[str] = "gradients from the loss"  # what a ledger calls that which the model itself saves
    plain_causal_lm: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled by the plain class, for the twin's own class stands in no module."""
        reduced = super().__reduce_ex__(protocol)
        assert isinstance(reduced, tuple)
        return _empty_twin, (self.plain_causal_lm,), *reduced[2:]


def make_lean_causal_lm(module: nn.Module) -> bool:
    """Make a causal language model its twin, in place; False, and nothing done, where it is none of LEAN_CLASSES."""
    cls: Any = type(module)
    if cls.__name__ not in LEAN_CLASSES or not cls.__module__.startswith("transformers.models."):
        return False
    if not isinstance(module, LeanCausalLM):
        _change_class(module, _twin_class(cls))
    return True


def make_plain_causal_lm(module: nn.Module) -> bool:
    """Make a twin the plain model again, in place; False where it is none."""
    if not isinstance(module, LeanCausalLM):
        return False
    _change_class(module, type(module).plain_causal_lm)
    return True


@functools.cache
def _twin_class(plain: Any) -> Any:
    """The twin's class. Its name is the plain one's: transformers derives the loss and `architectures` from it."""
    signature = inspect.signature(plain.forward)
    _, *names = (name for name, parameter in signature.parameters.items() if parameter.kind is _BY_POSITION_OR_NAME)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        if not _needs_only_the_loss(self, given):
            return plain.forward(self, *args, **kwargs)
        return _loss_only(self, given)

    # not functools.wraps: accelerate unwraps a forward as far as it goes, and would arrive at the plain one
    forward.__signature__ = signature  # type: ignore[attr-defined]
    forward.__doc__ = plain.forward.__doc__
    named = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    return type(plain.__name__, (LeanCausalLM, plain), {"forward": forward, "plain_causal_lm": plain, **named})


def _empty_twin(plain: Any) -> Any:
    twin = _twin_class(plain)
    return twin.__new__(twin)


def _change_class(module: nn.Module, new: type[nn.Module]) -> None:
    """Bound forwards that others have put on the instance (accelerate's hooks) follow."""
    own = MethodType(type(module).forward, module)
    for key, value in list(vars(module).items()):
        if isinstance(value, MethodType) and value == own:
            setattr(module, key, MethodType(new.forward, module))
    module.__class__ = new  # type: ignore[assignment]


def _needs_only_the_loss(model: Any, given: dict[str, Any]) -> bool:
    from transformers.loss.loss_utils import ForCausalLMLoss

    keep, as_dict = given.get("logits_to_keep", 0), given.get("return_dict")
    return (
        model.training
        and torch.is_grad_enabled()
        and given.get("labels") is not None
        and not isinstance(keep, Tensor)
        and keep == 0
        and (model.config.return_dict if as_dict is None else as_dict)
        and model.loss_function is ForCausalLMLoss
        and _is_plain_linear(model.lm_head)
        and model.lm_head.out_features == model.config.vocab_size
    )


def _is_plain_linear(head: nn.Module) -> bool:
    """Whether all that a layer does is x Wᵀ + b."""
    made_from = vars(type(head)).get("_plain_class", type(head))  # as the lean twin of a linear layer says it
    return (
        made_from is nn.Linear
        and not is_traceable_wrapper_subclass(head.weight)  # sharded, quantised
        and "forward" not in vars(head)
        and not any(_hooks(head))
    )


def _hooks(module: nn.Module) -> Iterator[Any]:
    """The hooks on a module, but for those by which this package's memory figures see which module runs."""
    for hooks in (
        module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks,
    ):  # fmt: skip
        for hook in hooks.values():
            if not getattr(hook, "__module__", "").startswith("velora.memory."):
                yield hook


def _loss_only(model: Any, given: dict[str, Any]) -> Any:
    """LLaMA's forward, with head and loss in one."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    rest = {key: value for key, value in given.items() if key not in ("labels", "logits_to_keep", "return_dict")}
    outputs = model.model(**rest)
    head, ignore_index = model.lm_head, given.get("ignore_index", -100)
    labels = given.get("shift_labels")
    if labels is None:  # the word after each; after the last one nothing counts
        labels = nn.functional.pad(given["labels"], (0, 1), value=ignore_index)[..., 1:]  # (B, T)
    loss = linear_cross_entropy(
        outputs.last_hidden_state,  # (B, T, D)
        head.weight,
        head.bias,
        labels,
        ignore_index=ignore_index,
        num_items=given.get("num_items_in_batch"),
    )
    return CausalLMOutputWithPast(
        loss=loss.float(),
        logits=None,
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )
