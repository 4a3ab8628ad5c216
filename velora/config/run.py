"""The composed configuration of one run: its keys, which of them are its identity, and the check of all of it.

Hydra composes YAML; it refuses unknown keys on the command line but not inside files. Here everything is read strictly into
one pydantic model, and one ConfigError names all that is wrong. The classes of the seven groups are in
`velora/config/<group>.py`, found by their kind (`velora/config/parts.py`). No torch here.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PlainValidator,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from velora.config.level import LevelName
from velora.config.parts import (
    Activations,
    Adapter,
    Model,
    Optimizer,
    Part,
    Recompute,
    Task,
    Weights,
    blaming,
    part_class,
    shipped_kinds,
)
from velora.config.processes import num_processes
from velora.config.read import listing, model_in, parse, shown, unknown_key
from velora.config.sharding import sharding_problems
from velora.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

T = TypeVar("T")

_INCIDENTAL = "incidental"
Incidental = Annotated[T, _INCIDENTAL]
"""A key that does not change what a run computes. All others are its identity: two configurations that differ only in incidental
keys are the same run, and such a key does not enter the name of a run."""


def _of_its_kind(value: Any, info: ValidationInfo) -> Part:
    """The value of a group as the class that its key `kind` names."""
    group = str(info.field_name)
    if not isinstance(value, dict) or "kind" not in value:
        raise ConfigError(
            f"{group}={shown(value)} has no key `kind`; choose one of the values in conf/{group}/ ({group}=...)"
        )
    kind = str(value["kind"])
    cls = part_class(group, kind, GROUPS[group])
    with blaming(group, kind):
        try:
            return cls.model_validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            refused = error
    raise refused  # pydantic adds its errors to those of the other sections


OfItsKind = Annotated[T, BeforeValidator(_of_its_kind)]


def _interval(value: Any) -> int | float | str:
    """A number of steps (int), a fraction of the run (float below 1), "epoch" or "end"."""
    if value in ("epoch", "end"):
        return value
    steps = isinstance(value, int) and not isinstance(value, bool) and value > 0
    fraction = isinstance(value, float) and math.isfinite(value) and 0 < value < 1
    if not steps and not fraction:
        raise PydanticCustomError("interval", "Must be a number of steps, a fraction of the run below 1, epoch or end")
    return value


Interval = Annotated[int | float | Literal["epoch", "end"], PlainValidator(_interval)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MethodConfig(Section):
    """A named point on the five axes; the axes themselves are the groups."""

    name: str


class DataConfig(Section):
    root: Incidental[Path | None] = None  # where the data lie, not what they are: their hashes are in the record

    @field_validator("root")
    @classmethod
    def _is_a_folder(cls, root: Path | None) -> Path | None:
        if root is not None and not os.path.isdir(root):  # False for what cannot be a path, too
            raise ValueError(
                f"data.root={shown(root)} is not a folder; give the folder below which glue/, c4/, vtab/ ... lie, or leave it out"
            )
        return root


class WandbConfig(Section):
    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = "velora"
    entity: str | None = None
    tags: list[str] = []


class ExperimentConfig(Section):
    """Which row of which table of the paper a run reproduces, and how far it is the published one.

    `published`: the settings that a source prints, and the source. `inferred`: those that were chosen because something printed
    points to them. `unknown`: those that nobody printed. `paper` holds the printed figures under the names of result.json, by
    task ("glue/sst2") or task and model ("c4 llama_60m"). `settings` holds what differs from column to column, by the name
    of the task or the model; the experiment's keys refer to it: `rank: ${experiment.settings.${model.name}.rank}`.
    `level`: how far all of this is the published setting (`velora/config/level.py`). `searched`: the keys of which several values
    were tried; the best one by the score `judged_by` (null: the printed one) of the first seed counts.
    """

    name: str
    table: str | None = None
    row: str | None = None
    level: Incidental[LevelName | None] = None  # what it changes stands in the keys that it sets
    searched: Incidental[list[str]] = []
    judged_by: Incidental[str | None] = None
    published: Incidental[str | None] = None
    inferred: Incidental[str | None] = None
    unknown: Incidental[str | None] = None
    note: Incidental[str | None] = None
    settings: Incidental[dict[str, dict[str, Any]]] = {}  # those of this run stand in the keys that refer to them
    # is compared with, not computed with; null: the row is not in the paper
    paper: Incidental[dict[str, dict[str, float]]] = {}

    @field_validator("paper", mode="before")
    @classmethod
    def _null_is_nothing(cls, paper: Any) -> Any:
        return {} if paper is None else paper


class TrainerConfig(Section):
    """The settings of the training loop. Exactly one of `num_epochs` and `max_steps` decides where it ends.

    With both given, `max_steps` wins (it is how a published recipe is cut short); intervals are a number of steps (int),
    a fraction of the run (float below 1), "epoch" or "end".

    `batch_size` is what papers mean by it: the examples of one optimiser step, over all processes and micro-batches.
    `micro_batch_size` are at most those of one forward in one process, as many as its memory allows; null: batch_size over the
    number of processes. How many micro-batches are accumulated follows, so the number of processes changes no result.
    """

    num_epochs: PositiveFloat | None
    max_steps: NonNegativeInt | None  # 0: nothing is trained, for a task that evaluates alone
    batch_size: PositiveInt
    micro_batch_size: PositiveInt | None
    eval_batch_size: PositiveInt
    drop_last: bool
    learning_rate: PositiveFloat
    weight_decay: NonNegativeFloat
    warmup_steps: NonNegativeInt
    warmup_ratio: float = Field(ge=0, lt=1)
    schedule: Literal["linear", "cosine", "constant"]
    min_lr_ratio: float = Field(ge=0, le=1)
    max_grad_norm: NonNegativeFloat | None
    precision: Literal["fp32", "bf16", "fp16"]
    eval_every: Interval
    save_every: Incidental[Interval]
    log_every: Incidental[PositiveInt]
    num_workers: NonNegativeInt  # the documents of a stream are dealt to these processes, so it changes the order
    compile: bool
    save_model: Incidental[bool]
    device: Incidental[Literal["auto", "cpu", "cuda"]]
    measure_memory: Incidental[bool]
    sharding: Literal["none", "fsdp"]

    @property
    def examples_per_forward(self) -> int:
        share = max(1, self.batch_size // num_processes())
        return min(self.micro_batch_size or share, share)

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of one optimiser step in each process."""
        return max(1, self.batch_size // (self.examples_per_forward * num_processes()))

    def problems(self) -> Iterator[str]:
        """Sentences about settings that contradict each other, or that would have no effect."""
        if self.num_epochs is None and self.max_steps is None:
            yield "trainer.num_epochs=null and trainer.max_steps=null: give one of them, it is where the run ends"
        yield from self._batch_problems()
        yield from self._schedule_problems()

    def _schedule_problems(self) -> Iterator[str]:
        if self.warmup_steps and self.warmup_ratio:
            yield (
                f"trainer.warmup_steps={self.warmup_steps} and trainer.warmup_ratio={self.warmup_ratio}: both are given; "
                "give one of them and set the other to 0"
            )
        if self.min_lr_ratio and self.schedule != "cosine":
            yield (
                f"trainer.min_lr_ratio={self.min_lr_ratio} has no effect with trainer.schedule={self.schedule}; set "
                "trainer.min_lr_ratio=0 or trainer.schedule=cosine"
            )

    def _batch_problems(self) -> Iterator[str]:
        processes = num_processes()
        given = f"trainer.batch_size={self.batch_size}"
        if self.batch_size % processes:
            yield f"{given} over {processes} processes is not a whole number; give a multiple of {processes}"
        elif self.batch_size % (self.examples_per_forward * processes):
            yield (
                f"{given} is no multiple of trainer.micro_batch_size={self.micro_batch_size} times {processes} "
                f"process{'es' if processes > 1 else ''}; batch_size counts the examples of a whole optimiser step"
            )


class Config(Section):
    """One run, validated. `raw` is the plain composed dictionary, as it goes into the record."""

    name: Incidental[str] = Field(pattern=r"^[\w+=,@-][^\s\\]*$")
    seed: int = Field(ge=0, le=2**32 - 1)  # what NumPy's generator takes
    runs_dir: Incidental[Path]
    resume: Incidental[Literal["auto", "never", "required"]]
    overwrite: Incidental[bool]
    objective: Incidental[str | None]

    method: MethodConfig
    experiment: ExperimentConfig | None = None
    data: DataConfig
    wandb: Incidental[WandbConfig]
    trainer: TrainerConfig

    weights: OfItsKind[Weights]
    adapter: OfItsKind[Adapter]
    optimizer: OfItsKind[Optimizer]
    activations: OfItsKind[Activations]
    recompute: OfItsKind[Recompute]
    model: OfItsKind[Model]
    task: OfItsKind[Task]

    _raw: dict[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def raw(self) -> dict[str, Any]:
        return self._raw

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """What an optimiser step, the `step`-th of the run, has after it."""
        self.adapter.after_step(model, self, optimizer, step)
        self.activations.after_step(model)

    @property
    def has_only_shapes(self) -> bool:
        """Whether nothing is trained or read: only memory, and on a GPU speed, are asked for (level `memory`)."""
        return self.experiment is not None and self.experiment.level == "memory"

    @property
    def folder(self) -> Path:
        """Where this run lives. Name and seed are its identity; there is no timestamp in it."""
        return self.runs_dir / self.name / f"seed{self.seed}"

    @field_validator("name")
    @classmethod
    def _is_a_folder_below_runs_dir(cls, name: str) -> str:
        for part in name.split("/"):
            if part == "..":
                raise ValueError(f"name={name} leaves runs_dir; give a name without ..")
            if len(part.encode()) > 255:
                raise ValueError(
                    f"name={name[:40]}...: a part of it has {len(part.encode())} bytes, and a file system takes 255; "
                    "give a shorter name"
                )
            if not part.isprintable():
                raise ValueError(f"name={part!r} holds a character that cannot be printed; give a name without it")
            if re.fullmatch(r"seed[0-9]+", part):
                raise ValueError(f"name={name}: {part} would lie inside the folder of another run; give another name")
        return name

    @field_validator("objective")
    @classmethod
    def _is_a_score(cls, objective: str | None) -> str | None:
        if objective is not None and not objective.startswith("metrics."):
            raise ValueError(
                f"objective={objective} is not a score; give its name in result.json, like metrics.accuracy or "
                "metrics.best.perplexity"
            )
        return objective

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        problems = [*self.trainer.problems(), *sharding_problems(self)]
        if self.trainer.max_steps == 0 and not self.task.evaluates_alone:
            problems.append(
                f"trainer.max_steps=0: task={self.task.name} has no scores without a training; give at least 1"
            )
        for group in GROUPS:
            part: Part = getattr(self, group)
            with blaming(group, part.kind):
                try:
                    problems += part.problems(self)
                except ConfigError as error:
                    problems.append(str(error))
        if problems:
            raise ConfigError(listing(problems))
        return self


GROUPS: dict[str, type[Part]] = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Part)
}
AXES = tuple(group for group in GROUPS if group not in ("model", "task"))
LATER_KEYS = {"trainer.sharding": "none"}
"""Keys that earlier versions did not have, and what their runs did."""


def validate(raw: dict[str, Any]) -> Config:
    """Turn the composed dictionary into a Config; ConfigError lists everything that is wrong with it, one sentence each."""
    config = parse(Config, raw, "", partial(_unknown, raw))
    config._raw = raw
    return config


def is_identity(key: str) -> bool:
    """Whether another value of the key (its full name) makes another run."""
    model: type[BaseModel] | None = Config
    for name in key.split("."):
        field = model.model_fields.get(name) if model else None
        if field is None:
            return True
        if _INCIDENTAL in field.metadata:
            return False
        model = model_in(field.annotation)
    return True


def differing_keys(old: dict[str, Any], new: dict[str, Any]) -> set[str]:
    """Full names of the keys in which two composed configurations are different runs; a key that one lacks is null there."""
    a, b = LATER_KEYS | flatten(old), LATER_KEYS | flatten(new)
    return {key for key in {*a, *b} if a.get(key) != b.get(key) and is_identity(key)}


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Full name -> value for all that lies in nested dictionaries."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flatten(item, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): value}


def _unknown(raw: dict[str, Any], key: str) -> str:
    """The sentence on an unknown key, which most often a method has set that was moved along one of its axes."""
    section, _, field = key.partition(".")
    if not field:
        return unknown_key(key, sorted(Config.model_fields))
    cls = model_in(Config.model_fields[section].annotation)
    if section in GROUPS:
        kind = raw[section]["kind"]
        cls = part_class(section, kind, GROUPS[section])
        others = [k for k in shipped_kinds(section) if field in part_class(section, k, GROUPS[section]).model_fields]
        if others:
            return (
                f"{key} is a key of {section}={' and '.join(others)}, not of {section}={kind}: the method, the experiment "
                "or the command line sets it"
            )
    assert cls is not None
    return unknown_key(key, sorted(f"{section}.{name}" for name in cls.model_fields))
