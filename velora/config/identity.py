"""When two configurations are the same run, and which config.yaml is one of ours. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from velora.run.files import why

# Keys (with all below them) that do not change what a run computes: two configurations that differ only here are the same
# run. `data.root` is where the data lies, not what it is: its files are in the record with their hashes. What an experiment
# prints of the paper is compared with, not computed with. `trainer.num_workers` is not here: the documents of a stream are
# dealt to the loading processes, so their number changes the order.
NOT_IDENTITY = {
    "name", "runs_dir", "resume", "overwrite", "wandb", "data.root",
    "experiment.paper", "experiment.note", "experiment.published", "experiment.inferred", "experiment.unknown",
    "experiment.settings",
    "trainer.device", "trainer.save_every", "trainer.save_model", "trainer.log_every", "trainer.measure_memory",
}  # fmt: skip
_OUR_KEYS = {"name", "seed", "model", "task", "trainer"}  # a config.yaml with these is one of ours


def differing_keys(old: dict[str, Any], new: dict[str, Any]) -> set[str]:
    """Full names of the keys in which two composed configurations are different runs; a key that one lacks is null there."""
    a, b = _identity(old), _identity(new)
    return {key for key in {*a, *b} if a.get(key) != b.get(key)}


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


def _identity(raw: dict[str, Any]) -> dict[str, Any]:
    """The keys that make a run what it is, with their full names."""
    return {key: value for key, value in _flatten(raw).items() if not _is_kept_out(key)}


def _is_kept_out(key: str) -> bool:
    parts = key.split(".")
    return any(".".join(parts[:n]) in NOT_IDENTITY for n in range(1, len(parts) + 1))


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in _flatten(item, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): value}
