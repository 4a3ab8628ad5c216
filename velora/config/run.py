"""The composed configuration: its fixed keys, and the check that everything in it is known, well-typed and makes sense.

Hydra composes YAML; it refuses unknown keys on the command line but not inside files. Here every key is checked against
the class of its group (`velora/config/parts.py`), all problems are collected, and one ConfigError names them all. No torch here.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PlainValidator,
    PositiveFloat,
    PositiveInt,
    field_validator,
)
from pydantic_core import PydanticCustomError

from velora.config.parts import (
    Activations,
    Adapter,
    Model,
    Optimizer,
    Part,
    Task,
    Weights,
    blaming,
    part_class,
    shipped_kinds,
)
from velora.config.processes import num_processes
from velora.config.read import listing, parse, shown, unknown_key
from velora.errors import ConfigError

GROUPS: dict[str, type[Part]] = {
    "weights": Weights,
    "adapter": Adapter,
    "optimizer": Optimizer,
    "activations": Activations,
    "model": Model,
    "task": Task,
}


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
    """A named point on the four axes; the axes themselves are the groups."""

    name: str


class DataConfig(Section):
    root: Path | None = None

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
    """

    name: str
    table: str | None = None
    row: str | None = None
    published: str | None = None
    inferred: str | None = None
    unknown: str | None = None
    note: str | None = None
    settings: dict[str, dict[str, Any]] = {}
    paper: dict[str, dict[str, float]] = {}


class TrainerConfig(Section):
    """The settings of the training loop. Exactly one of `num_epochs` and `max_steps` decides where it ends.

    With both given, `max_steps` wins (it is how a published recipe is cut short); intervals are a number of steps (int),
    a fraction of the run (float below 1), "epoch" or "end".

    `batch_size` is what papers mean by it: the examples of one optimiser step, over all processes and micro-batches.
    `micro_batch_size` are at most those of one forward in one process, as many as its memory allows; null: batch_size over the
    number of processes. How many micro-batches are accumulated follows, so the number of processes changes no result.
    """

    num_epochs: PositiveFloat | None
    max_steps: PositiveInt | None
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
    save_every: Interval
    log_every: PositiveInt
    num_workers: NonNegativeInt
    compile: bool
    save_model: bool
    device: Literal["auto", "cpu", "cuda"]
    measure_memory: bool

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


@dataclass(frozen=True)
class Config:
    """One run, validated. `raw` is the plain composed dictionary, as it goes into the record."""

    name: str
    seed: int
    runs_dir: Path
    resume: Literal["auto", "never", "required"]
    overwrite: bool
    method: MethodConfig
    experiment: ExperimentConfig | None
    data: DataConfig
    wandb: WandbConfig
    trainer: TrainerConfig
    weights: Weights
    adapter: Adapter
    optimizer: Optimizer
    activations: Activations
    model: Model
    task: Task
    raw: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Where this run lives. Name and seed are its identity; there is no timestamp in it."""
        return self.runs_dir / self.name / f"seed{self.seed}"


class _Run(Section):
    name: str = Field(pattern=r"^[\w+=,@-][^\s\\]*$")

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

    seed: int = Field(strict=True, ge=0, le=2**32 - 1)  # what NumPy's generator takes
    runs_dir: Path
    resume: Literal["auto", "never", "required"]
    overwrite: bool


_SECTIONS: dict[str, type[Section]] = {
    "method": MethodConfig,
    "experiment": ExperimentConfig,
    "data": DataConfig,
    "wandb": WandbConfig,
    "trainer": TrainerConfig,
}


def validate(raw: dict[str, Any]) -> Config:
    """Turn the composed dictionary into a Config; ConfigError lists everything that is wrong with it, one sentence each."""
    problems: list[str] = []

    def read(fill: Callable[[], Any]) -> Any:
        try:
            return fill()
        except ConfigError as error:
            problems.append(str(error))
            return None

    known = {*_SECTIONS, *GROUPS, *_Run.model_fields}
    problems += [unknown_key(key, sorted(known)) for key in raw if key not in known]
    found: dict[str, Any] = {}
    for key, section in _SECTIONS.items():
        absent = key == "experiment" and raw.get(key) is None
        found[key] = None if absent else read(partial(parse, section, raw.get(key), key))
    for group, base in GROUPS.items():
        found[group] = read(partial(_parse_part, group, raw.get(group), base))
    run = read(partial(parse, _Run, {k: v for k, v in raw.items() if k in _Run.model_fields}, ""))
    if problems:
        raise ConfigError(listing(problems))
    assert run is not None
    config = Config(**dict(run), **found, raw=raw)
    problems += _cross_checks(config)
    if problems:
        raise ConfigError(listing(problems))
    return config


def _cross_checks(config: Config) -> Iterator[str]:
    yield from config.trainer.problems()
    for group in GROUPS:
        part = getattr(config, group)
        with blaming(group, part.kind):
            try:
                found = list(part.problems(config))
            except ConfigError as error:
                found = [str(error)]
        yield from found


def _parse_part(group: str, value: Any, base: type[Part]) -> Part:
    if not isinstance(value, dict) or "kind" not in value:
        raise ConfigError(
            f"{group}={shown(value)} has no key `kind`; choose one of the values in conf/{group}/ ({group}=...)"
        )
    kind = str(value["kind"])
    cls = part_class(group, kind, base)
    with blaming(group, kind):
        return parse(cls, value, group, partial(_key_of_another_kind, group, kind))


def _key_of_another_kind(group: str, kind: str, key: str) -> str | None:
    """A sentence for a key that another value of the group has: most often set by a method that was moved along this axis."""
    field = key.partition(".")[2]
    others = [k for k in shipped_kinds(group) if field in part_class(group, k, GROUPS[group]).model_fields]
    if not others:
        return None
    return (
        f"{key} is a key of {group}={' and '.join(others)}, not of {group}={kind}: the method, the experiment or the "
        "command line sets it"
    )
