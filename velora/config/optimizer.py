"""What the optimiser keeps per parameter (the axis `optimizer`); the optimisers themselves are in `velora/optim`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, NegativeFloat, NonNegativeFloat, PositiveFloat, PositiveInt

from velora.config.parts import Optimizer
from velora.config.processes import num_processes

if TYPE_CHECKING:
    import torch
    from torch import nn

    from velora.config.run import Config


Beta = Annotated[float, Field(ge=0, lt=1)]


def layerwise_problems(setting: str, config: Config) -> Iterator[str]:
    """Sentences on clipping, scaled gradients and several processes; `setting` names what makes the optimiser layer-wise."""
    trainer = config.trainer
    if num_processes() > 1:
        yield (
            f"{setting} in {num_processes()} processes: a layer-wise optimiser uses gradients before they are averaged over "
            "the processes; start one process, or set optimizer.layerwise=false (lomo has no other form)"
        )
    if trainer.max_grad_norm:
        yield (
            f"trainer.max_grad_norm={trainer.max_grad_norm} with {setting}: each gradient is used and freed before the norm of "
            "all of them is known; set trainer.max_grad_norm=null"
        )
    if trainer.precision == "fp16":
        yield (
            f"trainer.precision=fp16 with {setting}: fp16 training scales the loss, and its gradients are used before they can "
            "be scaled back; use trainer.precision=bf16 or fp32"
        )


ONE_DIRECTION = (
    "optimizer.factored=true with activations.init=running_average: the moments of a factor hold for one direction; "
    "use activations.init=fixed_average, svd or random, or set optimizer.factored=false"
)
Fraction = Annotated[float, Field(gt=0, lt=1)]


class LowRankOptimizer(Optimizer):
    """`layers`: roles or patterns, null for every layer that plays a role. `rank`: a number, or a fraction of the shorter side."""

    takes_shards: ClassVar[bool] = False  # what it projects is a whole matrix
    ranks_rows: ClassVar[bool] = False  # the rank must be smaller than the number of rows, not than the shorter side

    layers: Annotated[list[str], Field(min_length=1)] | None
    rank: PositiveInt | Fraction
    layerwise: bool

    def problems(self, config: Config) -> Iterator[str]:
        if not config.adapter.trains_base_weights:
            yield (
                f"optimizer={self.kind} with adapter={config.adapter.kind}: it makes the state of large trained matrices "
                "smaller, and here they are frozen; use adapter=full or optimizer=adamw"
            )
        if self.layerwise:
            yield from layerwise_problems("optimizer.layerwise=true", config)

    def groups(self, model: nn.Module, config: Config, **options: Any) -> list[dict[str, Any]]:
        """Parameter groups: those with a rank, which also get `options`, and the others."""
        from velora.optim.low_rank import low_rank_groups

        return low_rank_groups(
            model, self.layers, self.rank, config.trainer.weight_decay, of_rows=self.ranks_rows, **options
        )

    def common_options(self, config: Config) -> dict[str, Any]:
        """What every optimiser that can update inside the backward pass is told."""
        return {
            "lr": config.trainer.learning_rate,
            "layerwise": self.layerwise,
            "accumulation_steps": config.trainer.accumulation_steps if self.layerwise else 1,
            "seed": config.seed,
        }


class AdafactorSettings(Optimizer):
    """The keys of Adafactor, which FLoRA is built on."""

    takes_shards: ClassVar[bool] = False  # row and column sums of whole matrices

    beta1: Annotated[float, Field(gt=0, lt=1)] | None
    eps: tuple[PositiveFloat, PositiveFloat]
    clip_threshold: PositiveFloat
    decay_rate: NegativeFloat
    scale_parameter: bool

    def adafactor_options(self) -> dict[str, Any]:
        return {
            name: getattr(self, name) for name in AdafactorSettings.model_fields.keys() - Optimizer.model_fields.keys()
        }


class AdamW(Optimizer):
    kind: Literal["adamw"]
    betas: tuple[Beta, Beta]
    eps: PositiveFloat
    fused: bool

    def build(self, model: nn.Module, config: Config) -> torch.optim.Optimizer:
        import torch

        from velora.optim.groups import weight_decay_groups

        groups = weight_decay_groups(model, config.trainer.weight_decay)
        return torch.optim.AdamW(
            groups, lr=config.trainer.learning_rate, betas=self.betas, eps=self.eps, fused=self.fused or None
        )


class AdamW8bit(Optimizer):
    """Tensors with fewer than `min_8bit_size` entries keep fp32 moments."""

    takes_shards: ClassVar[bool] = False  # bitsandbytes' kernels know no DTensor

    kind: Literal["adamw_8bit"]
    betas: tuple[Beta, Beta]
    eps: PositiveFloat
    min_8bit_size: PositiveInt

    def build(self, model: nn.Module, config: Config) -> torch.optim.Optimizer:
        from velora.optim.groups import weight_decay_groups
        from velora.optim.quantised_state import require_8bit_kernels

        require_8bit_kernels(next(model.parameters()).device)
        from bitsandbytes.optim import AdamW8bit as BitsandbytesAdamW8bit

        return BitsandbytesAdamW8bit(
            weight_decay_groups(model, config.trainer.weight_decay),
            lr=config.trainer.learning_rate,
            betas=self.betas,
            eps=self.eps,
            min_8bit_size=self.min_8bit_size,
        )


class Adafactor(AdafactorSettings):
    """The learning rate and its schedule are the trainer's: Adafactor's own (`relative_step`) is off."""

    kind: Literal["adafactor"]

    def build(self, model: nn.Module, config: Config) -> torch.optim.Optimizer:
        from velora.optim.adafactor import Adafactor as TorchAdafactor
        from velora.optim.groups import weight_decay_groups

        return TorchAdafactor(
            weight_decay_groups(model, config.trainer.weight_decay),
            lr=config.trainer.learning_rate,
            relative_step=False,
            warmup_init=False,
            **self.adafactor_options(),
        )


class GaLore(LowRankOptimizer):
    kind: Literal["galore"]
    update_proj_gap: PositiveInt
    scale: PositiveFloat
    proj_type: Literal["std", "reverse_std", "left", "right", "full"]
    svd: Literal["exact", "randomized"]
    bits: Literal[32, 8]
    betas: tuple[Beta, Beta]
    eps: NonNegativeFloat

    def build(self, model: nn.Module, config: Config) -> torch.optim.Optimizer:
        from velora.optim.galore import GaLoreAdamW

        options = {name: getattr(self, name) for name in ("update_proj_gap", "scale", "proj_type", "svd")}
        return GaLoreAdamW(
            self.groups(model, config, **options),
            betas=self.betas,
            eps=self.eps,
            bits=self.bits,
            **self.common_options(config),
        )


class QGaLore(LowRankOptimizer):
    trains_int8: ClassVar[bool] = True

    kind: Literal["q_galore"]
    update_proj_gap: PositiveInt
    scale: PositiveFloat
    svd: Literal["exact", "randomized"]
    cos_threshold: Annotated[float, Field(gt=0, le=1)] | None
    queue_size: PositiveInt
    bits: Literal[32, 8]
    betas: tuple[Beta, Beta]
    eps: NonNegativeFloat

    def build(self, model: nn.Module, config: Config) -> torch.optim.Optimizer:
        from velora.nn.int8 import int8_layers
        from velora.optim.q_galore import QGaLoreAdamW

        keys = ("update_proj_gap", "scale", "svd", "cos_threshold", "queue_size")
        return QGaLoreAdamW(
            self.groups(model, config, **{name: getattr(self, name) for name in keys}),
            betas=self.betas,
            eps=self.eps,
            bits=self.bits,
            int8=int8_layers(model),
            **self.common_options(config),
        )


class Grass(LowRankOptimizer):
    """`factored`: gradients and moments of VeLoRA's layers keep one number for each sub-token of a row."""

    ranks_rows: ClassVar[bool] = True

    kind: Literal["grass"]
    selection: Literal["top", "sampled"]
    update_gap: PositiveInt
    scale: PositiveFloat
    factored: bool
    betas: tuple[Beta, Beta]
    eps: NonNegativeFloat

    def problems(self, config: Config) -> Iterator[str]:
        yield from super().problems(config)
        if not self.factored:
            return
        if config.activations.kind != "velora":
            yield (
                f"optimizer.factored=true with activations={config.activations.kind}: only VeLoRA's gradients have factors; "
                "use activations=velora, or set optimizer.factored=false"
            )
        elif getattr(config.activations, "init", None) == "running_average":
            yield ONE_DIRECTION
        if not self.layerwise:
            yield (
                "optimizer.factored=true with optimizer.layerwise=false: factors are handed over inside the backward pass; set "
                "optimizer.layerwise=true and trainer.max_grad_norm=null"
            )
        if config.trainer.compile:
            yield (
                "optimizer.factored=true with trainer.compile=true: a traced layer hands over no factors; set "
                "trainer.compile=false or optimizer.factored=false"
            )

    def build(self, model: nn.Module, config: Config) -> torch.optim.Optimizer:
        from velora.optim.grass import GrassAdamW
        from velora.optim.grass_factors import FactoredGrassAdamW

        options = {name: getattr(self, name) for name in ("selection", "update_gap", "scale")}
        groups = self.groups(model, config, **options)
        adam = {"betas": self.betas, "eps": self.eps, **self.common_options(config)}
        if not self.factored:
            return GrassAdamW(groups, **adam)
        optimizer = FactoredGrassAdamW(groups, **adam)
        optimizer.take_factors(model)
        return optimizer


class FLoRA(LowRankOptimizer, AdafactorSettings):
    kind: Literal["flora"]
    kappa: PositiveInt
    sketched: Literal["past", "all"]

    def problems(self, config: Config) -> Iterator[str]:
        yield from super().problems(config)
        accumulated = self.layerwise and config.trainer.accumulation_steps > 1
        if self.beta1 is None and not accumulated:
            yield (
                "optimizer.beta1=null without optimizer.layerwise=true and a smaller trainer.micro_batch_size: FLoRA "
                "has neither a momentum nor a sum of gradients to compress; use optimizer=adafactor, or set optimizer.beta1=0.9"
            )
        elif self.beta1 is None and self.sketched == "all":
            yield (
                "optimizer.sketched=all has no effect with optimizer.beta1=null: there is no momentum to sketch; set "
                "optimizer.sketched=past"
            )

    def build(self, model: nn.Module, config: Config) -> torch.optim.Optimizer:
        from velora.optim.flora import Flora

        return Flora(
            self.groups(model, config),
            kappa=self.kappa,
            sketched=self.sketched,
            **self.adafactor_options(),
            **self.common_options(config),
        )


class LOMO(Optimizer):
    takes_shards: ClassVar[bool] = False  # its hooks see gradients before they are averaged over processes

    kind: Literal["lomo"]
    max_grad_value: PositiveFloat | None

    def problems(self, config: Config) -> Iterator[str]:
        yield from layerwise_problems("optimizer=lomo", config)
        if config.trainer.accumulation_steps > 1:
            yield (
                f"trainer.micro_batch_size={config.trainer.micro_batch_size} of {config.trainer.batch_size} examples with "
                "optimizer=lomo: it keeps no gradients, so there is nothing to accumulate in; set trainer.micro_batch_size=null"
            )

    def build(self, model: nn.Module, config: Config) -> torch.optim.Optimizer:
        from velora.optim.groups import weight_decay_groups
        from velora.optim.lomo import Lomo

        groups = weight_decay_groups(model, config.trainer.weight_decay)
        return Lomo(groups, lr=config.trainer.learning_rate, max_grad_value=self.max_grad_value)
