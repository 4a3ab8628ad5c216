"""What VeLoRA would free: which layers let which bytes go, and which let none go because somebody else holds them too.

VeLoRA makes a layer let go of its input. The input's storage disappears only when every holder lets go of it: in a LLaMA
block query, key and value read one tensor, so any one or two of them free nothing, and the input of the output
projection stays because attention keeps its own output.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn

from velora.config.roles import roles_by_module, roles_of
from velora.config.run import Config
from velora.errors import ConfigError
from velora.memory.ledger import ACTIVATION, Entry, Holder, Ledger
from velora.nn.apply import velora_layers
from velora.nn.projection import split_width
from velora.nn.swap import can_be_twin, expand_container, find_modules, width_of

DEFAULT_SUB_TOKEN_SIZE = 16
_RELU = "ReLU (Relu)"  # keeps its output, and with recompute=lean signs in its place


@dataclass(frozen=True)
class Freed:
    """What one choice of layers does. `held_bytes`: what they hold, alone or with others; `freed_bytes`: what disappears
    when all of them let go; `codes_bytes`: what they keep instead. `also_held_by` names those who keep the rest: roles
    that could join the choice, and operations that never let go."""

    choice: str
    held_bytes: int
    freed_bytes: int
    codes_bytes: int
    can_join: tuple[str, ...]
    never_let_go: tuple[str, ...]

    @property
    def saved_bytes(self) -> int:
        """Net effect: negative where the codes cost more than what is freed."""
        return self.freed_bytes - self.codes_bytes


def layers_by_role(model: nn.Module) -> dict[str, list[str]]:
    """Role -> paths of the layers that VeLoRA on this role would take: plain ones whose weight trains."""
    found: dict[str, list[str]] = {}
    for role, patterns in roles_of(model).items():
        for name, module in find_modules(model, patterns).items():
            inner = expand_container(name, module)
            paths = [path for path, layer in inner if can_be_twin(layer) and layer.weight.requires_grad]
            if paths:
                found.setdefault(role, []).extend(paths)
    return found


def what_would_be_freed(
    ledger: Ledger,
    choices: Mapping[str, Collection[str]],
    sub_token_sizes: Mapping[str, int] | None = None,
    *,
    shared_codes: bool = True,
) -> list[Freed]:
    """What each choice frees, out of the ledger of a model in which the chosen layers are still plain.

    `choices` maps a name (a role, a method) to module paths. `sub_token_sizes` maps module paths to S; the codes
    of a layer are its input over S, and 0 bytes where no size is given. Layers that read one tensor with one S share their codes
    unless their directions differ: `shared_codes=False`, for random ones and for running averages.
    """
    swappable = {path for paths in choices.values() for path in paths}
    sizes = sub_token_sizes or {}
    return [_freed(ledger, name, set(paths), swappable, sizes, shared_codes) for name, paths in choices.items()]


def what_velora_would_free(ledger: Ledger, plain: nn.Module, configured: nn.Module, config: Config) -> list[Freed]:
    """Each role alone, each input's readers together, and the configuration's own choice, out of the plain network's ledger."""
    choices = layers_by_role(plain)
    names = {role: "+".join(r for r, paths in choices.items() if paths == own) for role, own in choices.items()}
    choices = {names[role]: paths for role, paths in choices.items()}  # a fused layer stands once
    sizes = {p: _sub_token_size(config, role, plain.get_submodule(p)) for role, paths in choices.items() for p in paths}
    shared = getattr(config.activations, "init", "fixed_average") in ("fixed_average", "svd")
    alone = what_would_be_freed(ledger, choices, sizes, shared_codes=shared)
    together = {}
    for choice in alone:
        readers = sorted({choice.choice, *choice.can_join}, key=list(choices).index)
        if len(readers) > 1:
            together[" + ".join(readers)] = [p for role in readers for p in choices[role]]
    together["all"] = list(dict.fromkeys(p for paths in choices.values() for p in paths))
    if twins := velora_layers(configured):
        sizes |= {path: twin.sub_token_size for path, twin in twins.items()}
        together[f"this configuration ({config.method.name})"] = list(twins)
    return [*alone, *what_would_be_freed(ledger, together, sizes, shared_codes=shared)]


def _sub_token_size(config: Config, role: str, module: nn.Module) -> int:
    """S of a layer: the configuration's own where it has one for the role, else 16 where that divides the width."""
    width = width_of(module)
    given = {key: getattr(config.activations, key, None) for key in ("num_groups", "sub_token_size")}
    given = {key: value.get(role) if isinstance(value, dict) else value for key, value in given.items()}
    try:
        return split_width(width, **given)[1]
    except ConfigError:
        return DEFAULT_SUB_TOKEN_SIZE if width % DEFAULT_SUB_TOKEN_SIZE == 0 else width


def _freed(
    ledger: Ledger,
    choice: str,
    paths: set[str],
    swappable: set[str],
    sub_token_sizes: Mapping[str, int],
    shared_codes: bool,
) -> Freed:
    held = freed = codes = 0
    join: dict[str, None] = {}
    never: dict[str, None] = {}
    for entry in _inputs_held_by(ledger, paths):
        inside = {holder.module for holder in entry.holders} & paths
        held += entry.num_bytes
        sizes = [sub_token_sizes[path] for path in inside if path in sub_token_sizes]
        codes += sum(entry.num_bytes // size for size in (set(sizes) if shared_codes else sizes))
        others = [holder for holder in entry.holders if holder.module not in paths and not _keeps_signs_then(holder)]
        if not others and not entry.outside_hook:
            freed += entry.num_bytes
            codes += math.prod(entry.shape) // 8 if any(map(_keeps_signs_then, entry.holders)) else 0
        join |= dict.fromkeys(holder.role or holder.module for holder in others if holder.module in swappable)
        never |= dict.fromkeys(_naming(h.kind, h.operation) for h in others if h.module not in swappable)
    return Freed(choice, held, freed, codes, tuple(join), tuple(never))


def _keeps_signs_then(holder: Holder) -> bool:
    """Whether an operation keeps a bit for each number once there is a VeLoRA convolution, see velora/nn/lean_conv.py."""
    return holder.kind == "LeanReLU" and holder.operation.startswith("ReluBackward")


def _inputs_held_by(ledger: Ledger, paths: Collection[str]) -> list[Entry]:
    return [
        entry
        for entry in ledger.entries
        if entry.term == ACTIVATION and any(holder.module in paths for holder in entry.holders)
    ]


def _naming(kind: str, operation: str) -> str:
    return f"{kind} ({operation.removesuffix('0').removesuffix('Backward')})"


def layers_that_free_nothing(model: nn.Module, ledger: Ledger) -> list[str]:
    """Sentences for the user about VeLoRA layers whose input stays in memory all the same; empty if there are none.

    `ledger` is that of the model with its VeLoRA layers in place, so nothing is predicted here: an input that is
    alive after the forward was kept by somebody else. One sentence per role, naming who would have to join.
    """
    named = roles_by_module(model)
    can_join = {path for path, module in model.named_modules() if can_be_twin(module)}
    by_role: dict[str, list[str]] = {}
    for path in velora_layers(model):
        by_role.setdefault(named.get(path, path), []).append(path)
    sentences = []
    for role, paths in by_role.items():
        kept = [path for path in paths if ledger.inputs.get(path)]
        if not kept:
            continue
        entries = [ledger.entries[index] for path in kept for index in ledger.inputs[path]]
        holders = [holder for entry in entries for holder in entry.holders]
        join = dict.fromkeys(holder.role or holder.module for holder in holders if holder.module in can_join)
        never = dict.fromkeys(_naming(h.kind, h.operation) for h in holders if h.module not in can_join)
        sentences.append(_sentence(role, len(kept), len(paths), tuple(join), tuple(never)))
    return sentences


def _sentence(role: str, num_kept: int, num_layers: int, join: tuple[str, ...], never: tuple[str, ...]) -> str:
    where = "" if num_kept == num_layers else f" in {num_kept} of its {num_layers} layers"
    start = f"VeLoRA on {role} frees no memory{where}: its input is also kept by {', '.join((*join, *never))}"
    if never == (_RELU,) and not join:
        return f"{start}; recompute=lean frees it"
    if never:
        return f"{start}; no choice of layers frees it"
    return f"{start}; add {', '.join(join)} to the layers to free it"
