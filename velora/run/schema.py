"""What a run writes and what is read back: result.json, and one line of metrics.jsonl.

One schema for both directions: `Run` checks a record with it before it is written, `velora-report` and the next run with the
same configuration read records with it. Anything else found under these names is refused with a reason. No torch here.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from velora.run.files import why

M = TypeVar("M", bound=BaseModel)

_OUR_KEYS = {"name", "seed", "model", "task", "trainer"}  # a config.yaml with these is one of ours


def _number(value: Any) -> int | float:
    """A number that can be added up and drawn: no truth value, no NaN, no infinity, no integer of a thousand digits."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise PydanticCustomError("number", "Is not a number")
    return value


def _scores(value: Any) -> Any:
    """Numbers and nulls under their names, and the same once more for each phase and for `best`."""
    if isinstance(value, dict):
        return {str(key): _scores(inner) for key, inner in value.items()}
    return None if value is None else _number(value)


Number = Annotated[int | float, PlainValidator(_number)]
Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Name = Annotated[str, Field(strict=True, min_length=1)]


class _Part(BaseModel):
    """Further keys are kept as they are: a record of a later version stays readable."""

    model_config = ConfigDict(extra="allow")


OF_SHAPES = ("accounting_bytes", "input_activations_bytes")
"""Keys of `memory` that only records of level `memory` have."""


class Memory(_Part):
    """Bytes; null where a term was not measured."""

    weights_bytes: Count | None = None
    gradients_bytes: Count | None = None
    optimizer_bytes: Count | None = None
    saved_for_backward_bytes: Count | None = None
    peak_allocated_bytes: Count | None = None
    peak_reserved_bytes: Count | None = None
    peak_estimated_bytes: Count | None = None
    accounting_bytes: Count | None = None  # weights and inputs of trained layers, as the paper counts
    input_activations_bytes: Count | None = None  # of it, the inputs


class Speed(_Part):
    steps_per_second: Number | None = None
    tokens_per_second: Number | None = None
    images_per_second: Number | None = None
    train_seconds: Number | None = None


class Parameters(_Part):
    total: Count | None = None
    trainable: Count | None = None


class Git(_Part):
    commit: str | None = None
    dirty: bool | None = None


class _Experiment(_Part):
    paper: dict[str, dict[str, Number | None]] | None = None


class _Task(_Part):
    group: str | None = None


class RecordedConfig(_Part):
    """The composed configuration; only what the report reads of it has a type here."""

    experiment: _Experiment | None = None
    task: _Task | None = None


class Result(_Part):
    """result.json. Keys without a default are required."""

    name: Name
    status: Literal["ok", "failed", "out_of_memory", "diverged"]
    error: str | None = None
    method: Name
    model: Name
    task: Name
    seed: Count
    metrics: dict[str, Annotated[Any, PlainValidator(_scores)]]
    memory: Memory
    speed: Speed
    parameters: Parameters
    data: dict[str, Any] | None = None
    device: str | None = None
    versions: dict[str, str] = {}
    git: Git = Git()
    command: str = ""
    config: RecordedConfig

    @field_validator("metrics")
    @classmethod
    def _best_is_a_group_of_scores(cls, metrics: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(metrics.get("best", {}), dict):
            raise PydanticCustomError("best", "Has no scores under best")
        return metrics


class MetricsLine(_Part):
    """One line of metrics.jsonl: what was logged after `step` optimiser steps of `phase`; all other values are numbers."""

    __pydantic_extra__: dict[str, Number | None] = Field(init=False)

    phase: Name
    step: Count


def check(model: type[M], value: Any) -> M:
    """The value as `model`; ValueError with the first thing that is wrong with it."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first, *others = error.errors(include_url=False)
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            sentence = f"{key} is missing"
        else:
            given = repr(first["input"])
            given = given if len(given) <= 60 else given[:57] + "..."
            message = first["msg"][0].lower() + first["msg"][1:]
            sentence = f"{key}={given}: {message}" if key else f"{given}: {message}"
        raise ValueError(sentence + (f", and {len(others)} more" if others else "")) from None


def read_result(path: Path) -> Result:
    """The record in one file; ValueError with the reason where there is none."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a file")
        return check(Result, parse_json(path.read_bytes()))
    except OSError as error:
        raise ValueError(why(error)) from None


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines of metrics.jsonl that are whole, and a reason for each other one ("line 7: ..."). OSError if it cannot be read.

    A process that was killed, or whose disk was full, leaves half a line at the end.
    """
    lines, problems = [], []
    for number, text in enumerate(path.read_bytes().split(b"\n"), 1):
        if not text.strip():
            continue
        try:
            lines.append(check(MetricsLine, parse_json(text)).model_dump())
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    return lines, problems


def read_config(file: Path) -> dict[str, Any]:
    """config.yaml of an earlier run; ValueError with the reason where it is none."""
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(why(error)) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ValueError("it is not YAML" + (f", line {mark.line + 1}" if mark else "")) from None
    except (ValueError, RecursionError):  # not UTF-8, a date that does not exist, nested too deep
        raise ValueError("it cannot be read") from None
    if not isinstance(raw, dict):
        raise ValueError("it is not a mapping of keys")
    if missing := sorted(_OUR_KEYS - raw.keys()):
        raise ValueError(f"it has no {', '.join(missing)}")
    return raw


def parse_json(text: bytes) -> Any:
    """One JSON value in UTF-8; ValueError with a short reason. NaN and Infinity, which Python would take, are no JSON."""
    try:
        return json.loads(text.decode(), parse_constant=_no_json)
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error.msg} at character {error.pos})") from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except ValueError as error:  # an integer of thousands of digits, NaN
        raise ValueError(str(error).partition(";")[0]) from None


def _no_json(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def plain_json(value: Any) -> Any:
    """As JSON has it: no NaN and no infinity (null in their place), no scalars of NumPy or torch, no paths."""
    if isinstance(value, dict):
        return {str(k): plain_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(v) for v in value]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
