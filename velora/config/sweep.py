"""The keys of a sweep (`velora-train -m`): how its runs are carried out, never what one of them computes.

They stand in the composed configuration under `sweep`, and are taken out of it before a run is validated: they are no part
of a run's identity, of its config.yaml or of its record. No torch here.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from velora.config.read import parse
from velora.errors import ConfigError


class SweepConfig(BaseModel):
    """The same for all runs of a sweep; `conf/config.yaml` says what each key means."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str | None = Field(default=None, pattern=r"^\w[\w+=,.@-]{0,99}$")
    jobs: PositiveInt | None = None
    retry: Literal["failed", "all"] | None = None
    on_failure: Literal["continue", "stop"] = "continue"
    cluster: Literal["slurm", "local"] | None = None
    cluster_options: dict[str, Any] | None = None


def take_sweep(raw: dict[str, Any]) -> SweepConfig:
    """Take the section out of a composed configuration; ConfigError names what is wrong in it."""
    sweep = parse(SweepConfig, raw.pop("sweep", None) or {}, "sweep")
    if sweep.cluster_options and sweep.cluster is None:
        raise ConfigError(
            "sweep.cluster_options has no effect without a cluster; give sweep.cluster=slurm, or leave it out"
        )
    return sweep


def is_sweep_key(key: str) -> bool:
    return key == "sweep" or key.startswith("sweep.")
