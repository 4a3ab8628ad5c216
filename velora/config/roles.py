"""Which layer of a network plays which role: the one place where layer names of architectures are written down.

A method says `[value, down]`; a network says how its value and down projections are called. The names stand
in this table, in an attribute `velora_roles` of the model, or in the config key `model.roles`; whoever comes later in
this list wins. A network that was built from a configuration carries the outcome as its `velora_roles`; `roles_of` reads it.

A pattern is a shell glob over the dotted module name. It matches the whole name or the end of it from a dot on, so that it
also finds layers of a wrapped model (PEFT, DDP). A `*` crosses dots.

No torch here: a configuration is checked with this file before the heavy imports.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from velora.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

ROLES = ("query", "key", "value", "output", "gate", "up", "down")
"""Attention's query, key, value and output projections; the MLP's gate, up (first) and down (second) layer."""

Roles = Mapping[str, Sequence[str]]
"""Role -> glob patterns of module names."""

# The first architecture with a match for each of its roles is taken, so the more specific come first.
# fmt: off
ARCHITECTURES: dict[str, dict[str, tuple[str, ...]]] = {
    "llama": {  # also Mistral, Qwen, Gemma, OLMo
        "query": ("self_attn.q_proj",), "key": ("self_attn.k_proj",), "value": ("self_attn.v_proj",),
        "output": ("self_attn.o_proj",),
        "gate": ("mlp.gate_proj",), "up": ("mlp.up_proj",), "down": ("mlp.down_proj",),
    },
    "bert": {  # also RoBERTa, MiniLM, ELECTRA; the digit before .output keeps attention.output.dense out of down
        "query": ("attention.self.query",), "key": ("attention.self.key",), "value": ("attention.self.value",),
        "output": ("attention.output.dense",),
        "up": ("intermediate.dense",), "down": ("layer.*[0-9].output.dense",),
    },
    "deberta": {
        "query": ("attention.self.query_proj",), "key": ("attention.self.key_proj",),
        "value": ("attention.self.value_proj",), "output": ("attention.output.dense",),
        "up": ("intermediate.dense",), "down": ("layer.*[0-9].output.dense",),
    },
    "timm_vit_split": {  # model.split_qkv: velora/nn/split_qkv.py
        "query": ("attn.qkv.query",), "key": ("attn.qkv.key",), "value": ("attn.qkv.value",), "output": ("attn.proj",),
        "up": ("mlp.fc1",), "down": ("mlp.fc2",),
    },
    "timm_vit": {  # one fused layer computes query, key and value
        "query": ("attn.qkv",), "key": ("attn.qkv",), "value": ("attn.qkv",), "output": ("attn.proj",),
        "up": ("mlp.fc1",), "down": ("mlp.fc2",),
    },
    "vit": {  # transformers' own ViT and DeiT
        "query": ("attention.q_proj",), "key": ("attention.k_proj",), "value": ("attention.v_proj",),
        "output": ("attention.o_proj",), "up": ("mlp.fc1",), "down": ("mlp.fc2",),
    },
    "opt": {  # also BART and CLIP
        "query": ("self_attn.q_proj",), "key": ("self_attn.k_proj",), "value": ("self_attn.v_proj",),
        "output": ("self_attn.out_proj",), "up": ("fc1",), "down": ("fc2",),
    },
    "distilbert": {
        "query": ("attention.q_lin",), "key": ("attention.k_lin",), "value": ("attention.v_lin",),
        "output": ("attention.out_lin",), "up": ("ffn.lin1",), "down": ("ffn.lin2",),
    },
    "gpt_neox": {  # fused like timm's
        "query": ("attention.query_key_value",), "key": ("attention.query_key_value",),
        "value": ("attention.query_key_value",), "output": ("attention.dense",),
        "up": ("mlp.dense_h_to_4h",), "down": ("mlp.dense_4h_to_h",),
    },
    # Without attention: a block's first layer is value and up, its last one output and down, as where one fused layer has several
    # roles. A bottleneck's up is its 3 x 3 convolution. Stems and shortcuts have no role.
    "resnet_bottleneck": {
        "value": ("layer[0-9]*.[0-9]*.conv1",), "output": ("layer[0-9]*.[0-9]*.conv3",),
        "up": ("layer[0-9]*.[0-9]*.conv2",), "down": ("layer[0-9]*.[0-9]*.conv3",),
    },
    "resnet": {
        "value": ("layer[0-9]*.[0-9]*.conv1",), "output": ("layer[0-9]*.[0-9]*.conv2",),
        "up": ("layer[0-9]*.[0-9]*.conv1",), "down": ("layer[0-9]*.[0-9]*.conv2",),
    },
    "convnext": {  # timm's; conv_dw is depthwise, and has no channel sub-tokens
        "value": ("stages.*.blocks.*.mlp.fc1",), "output": ("stages.*.blocks.*.mlp.fc2",),
        "up": ("stages.*.blocks.*.mlp.fc1",), "down": ("stages.*.blocks.*.mlp.fc2",),
    },
    # In its attention form (arXiv 2405.21060) x is the value, B the key, C the query. in_proj makes x and the gate, x_proj makes B,
    # C and the rank of the time step. conv1d is depthwise; of dt_proj only the weight is read, its forward never runs.
    "mamba": {
        "query": ("mixer.x_proj",), "key": ("mixer.x_proj",), "value": ("mixer.in_proj",), "output": ("mixer.out_proj",),
        "gate": ("mixer.in_proj",), "up": ("mixer.in_proj",), "down": ("mixer.out_proj",),
    },
    "gpt2": {  # fused too; its layers are transformers' Conv1D
        "query": ("attn.c_attn",), "key": ("attn.c_attn",), "value": ("attn.c_attn",), "output": ("attn.c_proj",),
        "up": ("mlp.c_fc",), "down": ("mlp.c_proj",),
    },
}
# fmt: on


def matches(name: str, pattern: str) -> bool:
    """Whether the dotted module name, or its end from some dot on, is what the glob pattern describes."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def find_architecture(names: Iterable[str]) -> str | None:
    """The entry of `ARCHITECTURES` that has a module for each of its roles; None where no entry does."""
    names = list(names)
    for architecture, roles in ARCHITECTURES.items():
        if all(any(matches(name, pattern) for pattern in patterns for name in names) for patterns in roles.values()):
            return architecture
    return None


def resolve_roles(names: Iterable[str], *candidates: Roles | None) -> Roles:
    """The roles of a model with these module names: the first of `candidates` that is given, else the table's.

    Empty where the architecture is not in the table. Raises ConfigError for a role whose patterns are one string.
    """
    for roles in candidates:
        if roles:
            for role, patterns in roles.items():
                if isinstance(patterns, str):
                    raise ConfigError(f"roles: {role}: {patterns!r} must be a list of patterns, like [{patterns!r}]")
            return roles
    architecture = find_architecture(names)
    return ARCHITECTURES[architecture] if architecture else {}


def role_of(name: str, roles: Roles) -> str | None:
    """The role that a module plays; those of a fused layer joined by "+" ("query+key+value"); None for no role."""
    found = [role for role, patterns in roles.items() if any(matches(name, pattern) for pattern in patterns)]
    return "+".join(found) or None


def roles_of(model: nn.Module, given: Roles | None = None) -> Roles:
    """The roles of a network: those that are `given`, else those that it declares in `velora_roles`, else the table's.

    A wrapper (PEFT, DDP, torch.compile) hides the attribute of the network inside it, hence the look into all modules.
    """
    declared = next((found for module in model.modules() if (found := getattr(module, "velora_roles", None))), None)
    return resolve_roles((name for name, _ in model.named_modules(remove_duplicate=False)), given, declared)


def roles_by_module(model: nn.Module) -> dict[str, str]:
    """Module path -> role, for each module that plays one or lies inside one that does (an adapter's layers)."""
    roles = roles_of(model)
    found: dict[str, str] = {}
    for path, _ in model.named_modules():  # a module comes before those inside it
        role = role_of(path, roles) or found.get(path.rpartition(".")[0])
        if role is not None:
            found[path] = role
    return found
