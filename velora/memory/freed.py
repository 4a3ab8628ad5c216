"""What would be freed: which layers let which bytes go, and which let none go because somebody else holds them too.

VeLoRA makes a layer let go of its input. The input's storage disappears only when every holder lets go of it: in a LLaMA
block query, key and value read one tensor, so any one or two of them free nothing, and the input of the output
projection stays because attention keeps its own output.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn

from velora.config.roles import Roles, resolve_roles
from velora.memory.ledger import ACTIVATION, Entry, Ledger, roles_of_modules
from velora.nn.swap import TWINS, expand_container, find_modules, module_names
from velora.nn.twin import VeloraTwin


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


def layers_by_role(model: nn.Module, roles: Roles | None = None) -> dict[str, list[str]]:
    """Role -> paths of the layers that VeLoRA on this role would take: plain ones whose weight trains."""
    resolved = resolve_roles(module_names(model), roles, getattr(model, "velora_roles", None))
    found: dict[str, list[str]] = {}
    for role, patterns in resolved.items():
        for name, module in find_modules(model, patterns).items():
            inner = expand_container(name, module)
            paths = [path for path, layer in inner if type(layer) in TWINS and layer.weight.requires_grad]
            if paths:
                found.setdefault(role, []).extend(paths)
    return found


def what_would_be_freed(
    ledger: Ledger, choices: Mapping[str, Collection[str]], sub_token_sizes: Mapping[str, int] | None = None
) -> list[Freed]:
    """What each choice frees, out of the ledger of a model in which the chosen layers are still plain.

    `choices` maps a name (a role, a method) to module paths. `sub_token_sizes` maps module paths to S; the codes
    of a layer are its input over S, and 0 bytes where no size is given.
    """
    swappable = {path for paths in choices.values() for path in paths}
    return [_freed(ledger, name, set(paths), swappable, sub_token_sizes or {}) for name, paths in choices.items()]


def _freed(
    ledger: Ledger, choice: str, paths: set[str], swappable: set[str], sub_token_sizes: Mapping[str, int]
) -> Freed:
    held = freed = codes = 0
    join: dict[str, None] = {}
    never: dict[str, None] = {}
    for entry in _inputs_held_by(ledger, paths):
        inside = {holder.module for holder in entry.holders} & paths
        held += entry.num_bytes
        codes += sum(entry.num_bytes // sub_token_sizes[path] for path in inside if path in sub_token_sizes)
        others = [holder for holder in entry.holders if holder.module not in paths]
        if not others and not entry.outside_hook:
            freed += entry.num_bytes
        join |= dict.fromkeys(holder.role or holder.module for holder in others if holder.module in swappable)
        never |= dict.fromkeys(_naming(h.kind, h.operation) for h in others if h.module not in swappable)
    return Freed(choice, held, freed, codes, tuple(join), tuple(never))


def _inputs_held_by(ledger: Ledger, paths: Collection[str]) -> list[Entry]:
    return [
        entry
        for entry in ledger.entries
        if entry.term == ACTIVATION and any(holder.module in paths for holder in entry.holders)
    ]


def _naming(kind: str, operation: str) -> str:
    return f"{kind} ({operation.removesuffix('0').removesuffix('Backward')})"


def layers_that_free_nothing(model: nn.Module, ledger: Ledger, roles: Roles | None = None) -> list[str]:
    """Sentences for the user about VeLoRA layers whose input stays in memory all the same; empty if there are none.

    `ledger` is that of the model with its VeLoRA layers in place, so nothing is predicted here: an input that is
    alive after the forward was kept by somebody else. One sentence per role, naming who would have to join.
    """
    named = roles_of_modules(model, roles)
    twins = [path for path, module in model.named_modules() if isinstance(module, VeloraTwin)]
    can_join = {path for path, module in model.named_modules() if type(module) in TWINS}
    by_role: dict[str, list[str]] = {}
    for path in twins:
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
    if never:
        return f"{start}; no choice of layers frees it"
    return f"{start}; add {', '.join(join)} to the layers to free it"
