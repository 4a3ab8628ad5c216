"""Which parameters train (the axis `adapter`): all, the head, or what an adapter inserts.

The mathematics of Hydra, LTE, MultiLoRA, SSF and PiSSA's loop is in `velora/nn`; LoRA is PEFT's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from velora.config.adapter_inserted import InsertedAdapter, seeded, target_patterns
from velora.config.parts import Adapter
from velora.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from velora.config.run import Config


class Full(Adapter):
    """Full training: no module is added and every parameter requires a gradient."""

    kind: Literal["full"]
    trains_base_weights: ClassVar[bool] = True

    def apply(self, model: nn.Module, config: Config) -> nn.Module:
        return model.requires_grad_(True)


class LinearProbe(Adapter):
    """Linear probing: the backbone is frozen, the head trains.

    The head is what `velora.nn.head.head_names` finds: the classification head of an encoder (two layers in RoBERTa) or
    of a vision transformer, the output layer of a language model. A language model whose output layer shares its weight
    with the input embedding gets a copy of its own for the head, so that the embedding stays as it was.
    """

    kind: Literal["linear_probe"]

    def apply(self, model: nn.Module, config: Config) -> nn.Module:
        from velora.nn.head import head_names, train_in_float32, untie_head

        model.requires_grad_(False)
        untie_head(model)
        for name in head_names(model):
            train_in_float32(model.get_submodule(name))
        return model

    def save(self, model: nn.Module, folder: Path) -> None:
        from velora.nn.adapter_state import save_adapter

        save_adapter(model, folder)


# What PEFT is asked for; "orthogonal" is drawn here afterwards.
_INITS: dict[str, Any] = {"default": True, "orthogonal": True, "pissa": "pissa", "olora": "olora"}


class LoRA(InsertedAdapter):
    """Low-rank adaptation (arXiv 2106.09685): y = x Wᵀ + factor · dropout(x) Aᵀ Bᵀ, with W frozen.

    `scaling`: what the factor is. "alpha_over_rank" as in the paper and PEFT, or "alpha" itself, as in the VeLoRA authors'
    vision code.

    `init`: "default" (A Kaiming-uniform, B zero), "orthogonal" (A and B each from torch.nn.init.orthogonal_, as in the VeLoRA
    authors' code: the network does not start as the pre-trained one; PEFT's initialisation of the same name is another,
    whose product B A is zero), "pissa" (arXiv 2404.02948: principal singular vectors of W, which keeps the rest) or
    "olora" (arXiv 2406.01775: QR of W).

    `pissa_rounds`: over weights in four bits, how often PiSSA's principal part is fitted again to what four bits lose
    (velora/nn/pissa.py). What is saved then belongs to that remainder: the same configuration loads it, `merge_adapter` makes a
    plain network of it, and PEFT by itself, over the original weights, does not.
    """

    kind: Literal["lora"]
    rank: PositiveInt
    alpha: PositiveFloat
    scaling: Literal["alpha_over_rank", "alpha"]
    dropout: float = Field(ge=0, lt=1)
    targets: list[str] = Field(min_length=1)
    init: Literal["default", "orthogonal", "pissa", "olora"]
    pissa_rounds: PositiveInt

    def quantiser(self, model: nn.Module, config: Config) -> Callable[..., nn.Module]:
        from velora.nn.pissa import quantise_residual
        from velora.nn.quantised import quantise_linear
        from velora.nn.swap import find_modules

        if self.init != "pissa":
            return super().quantiser(model, config)
        targets = set(find_modules(model, target_patterns(self.targets, model, config)))

        def quantise(name: str, linear: nn.Linear, **settings: Any) -> nn.Module:
            if name not in targets:
                return quantise_linear(linear, **settings)
            return quantise_residual(linear, rank=self.rank, rounds=self.pissa_rounds, **settings)

        return quantise

    def apply(self, model: nn.Module, config: Config) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        from velora.nn.head import train_in_float32
        from velora.nn.quantised import is_quantised
        from velora.nn.swap import find_modules

        targets = list(find_modules(model, target_patterns(self.targets, model, config)))
        quantised_pissa = self.init == "pissa" and any(is_quantised(module) for module in model.modules())
        trained_whole = self.also_trained(model)
        for name in trained_whole:
            train_in_float32(model.get_submodule(name))
        peft_config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha * (self.rank if self.scaling == "alpha" else 1),  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=targets,
            modules_to_save=trained_whole or None,
            init_lora_weights=_INITS[self.init] if not quantised_pissa else True,
        )
        with seeded(config.seed), _told_of_four_bits(model):
            adapted = get_peft_model(model, peft_config)
            if self.init == "orthogonal":
                _draw_orthogonal(adapted)
        if quantised_pissa:
            _set_principal(adapted, self.rank, config)
        _drop_frozen_copies(adapted)
        return adapted


def _draw_orthogonal(model: nn.Module) -> None:
    """A (rank x D) with orthonormal rows and B (M x rank) with orthonormal columns, in every LoRA layer."""
    from peft.tuners.lora import LoraLayer
    from torch import nn

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for factor in (*layer.lora_A.values(), *layer.lora_B.values()):
                nn.init.orthogonal_(factor.weight)


def _set_principal(model: nn.Module, rank: int, config: Config) -> None:
    """B = L / sqrt(s) and A = Rt / sqrt(s), for the factor s on B A: the principal parts, which four bits have left out."""
    import torch
    from peft.tuners.lora import LoraLayer

    from velora.nn.pissa import split_dense, take_factors
    from velora.nn.quantised import is_quantised

    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or layer.lora_A["default"].weight.is_meta:
            continue
        base = layer.get_base_layer()
        factors = take_factors(base) if is_quantised(base) else split_dense(base, rank)
        if factors is None:
            raise ConfigError(
                f"adapter.init=pissa: {name} was brought to four bits without it, so weights={config.weights.kind} cannot be "
                "combined with it; use adapter.init=default or weights=nf4"
            )
        root = layer.scaling["default"] ** 0.5
        with torch.no_grad():
            layer.lora_B["default"].weight.copy_(factors[0] / root)
            layer.lora_A["default"].weight.copy_(factors[1] / root)


def _drop_frozen_copies(model: nn.Module) -> None:
    """Let what trains whole stand alone: PEFT keeps the module as it was beside it, which only `disable_adapter` would read.

    The trained module takes its place under `original_module`. It is registered after `modules_to_save`, because a parameter
    goes by the first of its names, and the adapter's files have that one.
    """
    from peft.utils.other import ModulesToSaveWrapper

    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            del wrapper.original_module
            wrapper.original_module = wrapper.modules_to_save[wrapper.active_adapters[0]]


@contextmanager
def _told_of_four_bits(model: nn.Module) -> Iterator[None]:
    """PEFT takes its 4-bit layers only for a model that says it was loaded in four bits; ours was quantised after."""
    from velora.nn.quantised import is_quantised

    if not any(is_quantised(module) for module in model.modules()):
        yield
        return
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    try:
        yield
    finally:
        del model.is_loaded_in_4bit


class SSFAdapter(InsertedAdapter):
    """Scaling and shifting the features of a frozen network (arXiv 2210.08823).

    `targets`: roles or patterns; null for all places of the published code, which in any family are every linear
    layer, every norm and the patch embedding (in general: every convolution), but not the head.
    """

    kind: Literal["ssf"]
    targets: list[str] | None

    def apply(self, model: nn.Module, config: Config) -> nn.Module:
        from velora.nn.head import head_names, train_in_float32
        from velora.nn.ssf import SSF, can_have_ssf
        from velora.nn.swap import bare_layers, replace_modules

        model.requires_grad_(False)
        trained_whole = self.also_trained(model)
        excluded = tuple({*head_names(model), *trained_whole, *bare_layers(model)})

        def at_target(name: str, module: nn.Module) -> nn.Module:
            if can_have_ssf(module):
                return SSF(module)
            raise ConfigError(f"a {type(module).__name__} takes no scale and shift; a linear layer or a norm does")

        def everywhere(name: str, module: nn.Module) -> nn.Module:
            outside = any(name == e or name.startswith(e + ".") for e in excluded)
            return module if outside or not can_have_ssf(module) else SSF(module)

        with seeded(config.seed):
            if self.targets is None:
                replace_modules(model, ["*"], everywhere)
            else:
                replace_modules(model, target_patterns(self.targets, model, config), at_target)
        for name in trained_whole:
            train_in_float32(model.get_submodule(name))
        return model


class TaskSettings(BaseModel):
    """Scale and dropout that were published for one task."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scale: PositiveFloat
    dropout: float = Field(ge=0, lt=1)


class Hydra(InsertedAdapter):
    """Multi-head low-rank adaptation (arXiv 2309.06922).

    `scale` and `dropout`: a number, or null for the published value of the task in `per_task`, and where there is none
    scale 1 and no dropout.
    """

    kind: Literal["hydra"]
    rank: PositiveInt
    scale: PositiveFloat | None
    dropout: float | None = Field(ge=0, lt=1)
    targets: list[str] = Field(min_length=1)
    per_task: dict[str, TaskSettings]

    def settings(self, task: str) -> TaskSettings:
        """Scale and dropout for a task."""
        published = self.per_task.get(task, TaskSettings(scale=1.0, dropout=0.0))
        return TaskSettings(
            scale=published.scale if self.scale is None else self.scale,
            dropout=published.dropout if self.dropout is None else self.dropout,
        )

    def apply(self, model: nn.Module, config: Config) -> nn.Module:
        from velora.nn.hydra import HydraLinear

        settings = self.settings(config.task.name)

        def make(layer: nn.Linear) -> nn.Module:
            return HydraLinear(layer, rank=self.rank, scale=settings.scale, dropout=settings.dropout)

        self.insert(model, self.targets, config, make, "Hydra branches")
        return model


class MultiLoRA(InsertedAdapter):
    """Several low-rank branches, each with a learned scale for every output feature (arXiv 2311.11501).

    `rank` is that of one branch. Without LoRA's alpha: the scales, zero at first, are in its place.
    """

    kind: Literal["multilora"]
    num_branches: PositiveInt
    rank: PositiveInt
    dropout: float = Field(ge=0, lt=1)
    targets: list[str] = Field(min_length=1)

    def apply(self, model: nn.Module, config: Config) -> nn.Module:
        from velora.nn.multilora import MultiLoRALinear

        def make(layer: nn.Linear) -> nn.Module:
            return MultiLoRALinear(layer, num_branches=self.num_branches, rank=self.rank, dropout=self.dropout)

        self.insert(model, self.targets, config, make, "MultiLoRA branches")
        return model


class LTE(InsertedAdapter):
    """Parallel low-rank heads, each on its slice of the batch, merged into the weights every `merge_every` steps
    (arXiv 2402.16828; velora/nn/lte.py).

    `root_alpha`: layers that are query or key get the square root of `alpha`. `reset`: the heads start again at a merge, and so
    do the optimiser's moments of them. `targets` may hold "all", for every role that the network has.
    """

    kind: Literal["lte"]
    num_heads: PositiveInt
    rank: PositiveInt
    alpha: PositiveFloat
    root_alpha: bool
    merge_every: PositiveInt
    reset: bool
    targets: list[str] = Field(min_length=1)

    def problems(self, config: Config) -> Iterator[str]:
        trainer = config.trainer
        if trainer.examples_per_forward % self.num_heads:
            yield (
                f"adapter.num_heads={self.num_heads}: each head sees a slice of every micro-batch, and {self.num_heads} does not "
                f"divide the {trainer.examples_per_forward} examples of one (trainer.batch_size={trainer.batch_size}, "
                f"trainer.micro_batch_size={trainer.micro_batch_size}); give another number of heads or examples"
            )
        if config.weights.quantised:
            yield (
                f"adapter=lte with weights={config.weights.kind}: the heads are merged into the weights, which four bits would "
                "round away; use weights=dense"
            )
        if trainer.sharding != "none":
            yield (
                f"adapter=lte with trainer.sharding={trainer.sharding}: heads are merged into whole weights, of which each process "
                "holds a part; set trainer.sharding=none"
            )

    def apply(self, model: nn.Module, config: Config) -> nn.Module:
        from velora.config.roles import role_of, roles_of
        from velora.nn.lte import LTELinear

        roles = roles_of(model, config.model.roles)
        small = {id(m) for n, m in model.named_modules() if {"query", "key"} & {*(role_of(n, roles) or "").split("+")}}

        def make(layer: nn.Linear) -> nn.Module:
            alpha = self.alpha**0.5 if self.root_alpha and id(layer) in small else self.alpha
            return LTELinear(layer, num_heads=self.num_heads, rank=self.rank, alpha=alpha, reset=self.reset)

        named = [target for target in self.targets if target != "all"]
        everywhere = list(roles) if len(named) < len(self.targets) else []
        if not named and not everywhere:
            raise ConfigError(
                f"adapter.targets=[all] stands for all roles, and those of model={config.model.name} are not known; set "
                "model.roles, or name patterns of linear layers"
            )
        self.insert(model, list(dict.fromkeys([*everywhere, *named])), config, make, "LTE heads")
        return model

    def after_step(self, model: nn.Module, config: Config, optimizer: Any, step: int) -> None:
        from velora.nn.lte import merge_heads

        if step % self.merge_every == 0:
            for parameter in merge_heads(model, seed=f"{config.seed}/{step}"):
                optimizer.state.pop(parameter, None)

    def save(self, model: nn.Module, folder: Path) -> None:
        """The whole network, as plain layers with the heads merged, since its weights have moved."""
        from velora.nn.adapter_state import save_network
        from velora.nn.lte import as_plain

        with as_plain(model) as network:
            save_network(network, folder)
