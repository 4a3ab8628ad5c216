"""Carry out whole tables: one sweep, which can be stopped and goes on with the same command.

    velora-train -m table=table2 level=small data.root=DIR                  the table
    velora-train -m table=table2 level=small task=glue/mrpc seed=0,1,2      one column of it, with other seeds
    velora-train -m 'table=glob(*)' level=memory                            all tables

Every run is a run of velora-train, with the overrides of its cell; further overrides hold for all of them. First those that need no
result of another, then the further seeds at the best point of each search.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from velora.config.compose import arguments_of, checked_apart, compose, settings_of_a_sweep
from velora.config.level import judge_of, table_of
from velora.config.sweep import is_sweep_key
from velora.errors import ConfigError
from velora.run.record import Run
from velora.sweep.launcher import digest, listing_of_runs
from velora.sweep.outcome import record_of
from velora.sweep.sweep import Planned, Sweep
from velora.tables.plan import Asked, Cell, plan


def run_tables(arguments: Sequence[str]) -> int:
    """All runs of the tables that the arguments name; returns the exit status of the sweep. ConfigError for what cannot be."""
    options = arguments_of(arguments)
    _, overrides, folders = checked_apart(arguments)
    asked, sweep_keys = read_arguments(overrides)
    if not options.multirun:
        raise ConfigError(f"table={asked.tables[0]} is many runs: add -m")
    own = [] if options.config_dir is None else ["--config-dir", options.config_dir]
    cells, without = plan(asked, folders)
    for sentence in without:
        print(f"{sentence}; it is left out", flush=True)
    of_the_runs = [o for o in asked.overrides if o.startswith("runs_dir=")]
    settings, runs_dir = settings_of_a_sweep([*sweep_keys, *of_the_runs])
    firsts = [cell.first() for cell in cells]
    jobs = iter(_planned([run for first in firsts for run in first], options.config_dir))
    batches = [[next(jobs) for _ in first] for first in firsts]
    folder = runs_dir / ".sweep" / (settings.name or f"{'-'.join(asked.tables)[:60]}-{asked.level}-{digest(arguments)}")
    sweep = Sweep(settings, folder, [Path(sys.argv[0]).name, *arguments], own)
    sweep.run([job for batch in batches for job in batch])
    if not sweep.is_stopping():
        further = [
            run
            for cell, batch in zip(cells, batches, strict=True)
            if len(cell.points) > 1 and (best := _best(cell, batch)) is not None
            for run in cell.further(best)
        ]
        if further:
            sweep.run(_planned(further, options.config_dir))
    status = sweep.close()
    print(f"the tables: {' && '.join(f'velora-report {place}' for place in _places(cells, asked.level, runs_dir))}")
    return status


def read_arguments(overrides: Sequence[str]) -> tuple[Asked, list[str]]:
    """What is asked for, and the overrides of the sweep itself."""
    found: dict[str, Any] = {"level": "paper", "columns": {}}
    others, of_the_sweep = [], []
    for override in overrides:
        key, _, value = override.partition("=")
        values = value.split(",")
        if key == "table":
            found["tables"] = values
        elif key == "level":
            found["level"] = value
        elif key == "experiment":
            found["rows"] = values
        elif key == "seed":
            found["seeds"] = _seeds(override, values)
        elif key in ("task", "model"):
            found["columns"][key] = values
        elif is_sweep_key(key.lstrip("+~")):
            of_the_sweep.append(override)
        else:
            others.append(_one_value(override))
    return Asked(overrides=tuple(others), **found), of_the_sweep


def _seeds(override: str, values: list[str]) -> list[int]:
    if not all(value.isdecimal() for value in values):
        raise ConfigError(f"{override}: give seeds of a table as a list of numbers, like seed=0,1,2")
    return [int(value) for value in values]


def _one_value(override: str) -> str:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if OverridesParser.create().parse_overrides([override])[0].is_sweep_override():
        raise ConfigError(
            f"{override}: a table has rows, columns and seeds; give one value, which holds for all of its runs"
        )
    return override


def _planned(runs: Sequence[tuple[str, ...]], config_dir: str | None) -> list[Planned]:
    """The runs, composed and checked, their folders too; ConfigError with one listing of what is wrong with any of them."""
    planned, problems = [], []
    for run in runs:
        try:
            config = compose(*run, config_dir=config_dir)
            Run(config, look=True)
            planned.append(Planned(list(run), config))
        except ConfigError as error:
            problems.append((" ".join(run), str(error)))
    if problems:
        raise ConfigError(listing_of_runs(problems, len(runs)))
    return planned


def _best(cell: Cell, jobs: list[Planned]) -> tuple[str, ...] | None:
    """The point of the search with the best score; None where no run of it has one."""
    config, scores = jobs[0].config, {}
    judge = judge_of(config.raw["experiment"], config.task.name, config.model.name)
    for point, job in zip(cell.points, jobs, strict=True):
        record = record_of(job.config)
        score = None if record is None or record.status != "ok" else record.metrics.get(judge.score)
        if score is not None:
            scores[point] = score
    return judge.best(scores, key=scores.__getitem__) if scores else None


def _places(cells: Sequence[Cell], level: str, runs_dir: Path) -> list[Path]:
    below = runs_dir if level == "paper" else runs_dir / level
    return [below / table for table in dict.fromkeys(table_of(cell.experiment) for cell in cells)]
