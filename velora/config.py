"""The composed configuration: its fixed keys, and the check that everything in it is known, well-typed and makes sense.

Hydra composes YAML; it refuses unknown keys on the command line but not inside files. Here every key is checked against
the class of its group (`velora/group.py`), all problems are collected, and one ConfigError names them all. No torch here.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PlainValidator,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
)
from pydantic_core import PydanticCustomError

from velora.errors import ConfigError
from velora.group import Activations, Adapter, Model, Optimizer, Part, Task, Weights, part_class, shipped_kinds

T = TypeVar("T", bound=BaseModel)

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
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or value <= 0 or (value > 1 and value != int(value)):
        raise PydanticCustomError("interval", "Must be a number of steps, a fraction of the run below 1, epoch or end")
    return int(value) if value >= 1 else float(value)


Interval = Annotated[int | float | Literal["epoch", "end"], PlainValidator(_interval)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MethodConfig(Section):
    """A named point on the four axes; the axes themselves are the groups."""

    name: str


class DataConfig(Section):
    root: Path | None = None


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

    def batch_problems(self) -> Iterator[str]:
        processes = num_processes()
        given = f"trainer.batch_size={self.batch_size}"
        if self.batch_size % processes:
            yield f"{given} over {processes} processes is not a whole number; give a multiple of {processes}"
        elif self.batch_size % (self.examples_per_forward * processes):
            yield (
                f"{given} is no multiple of trainer.micro_batch_size={self.micro_batch_size} times {processes} "
                f"process{'es' if processes > 1 else ''}; batch_size counts the examples of a whole optimiser step"
            )


def num_processes() -> int:
    """Processes of this run: torchrun says it; one without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


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
        raise ConfigError(_listing(problems))
    assert run is not None
    config = Config(**dict(run), **found, raw=raw)
    problems += _cross_checks(config)
    if problems:
        raise ConfigError(_listing(problems))
    return config


def _cross_checks(config: Config) -> Iterator[str]:
    if config.trainer.num_epochs is None and config.trainer.max_steps is None:
        yield "trainer.num_epochs=null and trainer.max_steps=null: give one of them, it is where the run ends"
    yield from config.trainer.batch_problems()
    root = config.data.root
    if root is not None and not root.is_dir():
        yield f"data.root={root} is not a folder; give the folder below which glue/, c4/, vtab/ ... lie, or leave it out"
    for group in GROUPS:
        yield from getattr(config, group).problems(config)


def _parse_part(group: str, value: Any, base: type[Part]) -> Part:
    if not isinstance(value, dict) or "kind" not in value:
        raise ConfigError(f"{group} has no key `kind`; choose one of the values in conf/{group}/ ({group}=...)")
    return parse(
        part_class(group, value["kind"], base), value, group, partial(_key_of_another_kind, group, value["kind"])
    )


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


def parse(cls: type[T], value: Any, prefix: str, explain: Callable[[str], str | None] = lambda key: None) -> T:
    """Read one section; each pydantic error becomes a sentence that names the full key and the value.

    `explain` may have a better sentence on an unknown key than that it is unknown.
    """
    try:
        return cls.model_validate(value)
    except ValidationError as error:
        sentences = []
        for item in error.errors(include_url=False):
            key = ".".join(str(p) for p in (prefix, *item["loc"]) if p != "")
            if item["type"] == "extra_forbidden":
                known = sorted(f"{prefix}.{f}" if prefix else f for f in cls.model_fields)
                sentences.append(explain(key) or unknown_key(key, known))
            elif item["type"] == "missing":
                sentences.append(f"{key} is missing")
            elif item["type"] == "value_error":
                sentences.append(str(item["ctx"]["error"]))
            else:
                sentences.append(f"{key}={item['input']} is not valid: {item['msg'][0].lower()}{item['msg'][1:]}")
        raise ConfigError("; ".join(dict.fromkeys(sentences))) from None


# Keys that were renamed, with what to give now.
_RENAMED = {
    "trainer.gradient_accumulation_steps": "give trainer.micro_batch_size, the examples of one forward; trainer.batch_size "
    "are those of a whole optimiser step"
}


def unknown_key(key: str, known: list[str]) -> str:
    if key in _RENAMED:
        return f"{key} is no key any more: {_RENAMED[key]}"
    close = difflib.get_close_matches(key, known, n=1)
    if close:
        return f"{key} is not a key; did you mean {close[0]}?"
    if len(known) > 20:
        return f"{key} is not a key of this configuration; `--cfg job` prints it whole"
    return f"{key} is not a key; known keys here: {', '.join(known)}"


def unknown_value(group: str, value: str, known: list[str]) -> str:
    close = difflib.get_close_matches(value, known, n=1)
    hint = f"did you mean {close[0]}? It" if close else "it"
    return f"{group}={value} is not known; {hint} is one of {', '.join(known)}"


def _listing(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems: " + "; ".join(f"({i}) {p}" for i, p in enumerate(problems, 1))
