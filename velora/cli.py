"""The command line: compose with Hydra, check, hand over; every error ends in one sentence and an exit status.

Nothing here imports torch: `--help`, `--cfg job` and a refused configuration answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from velora.config.compose import arguments_of, checked, conf_dir, configured, one_sentence
from velora.config.processes import check_processes, num_processes
from velora.config.run import Config, flatten
from velora.errors import ConfigError, Interrupted, RunError

if TYPE_CHECKING:
    from velora.sweep.launcher import Sweeps

Job = Callable[[Config], float | None]
"""What a program does with a configuration; a number is the score of a run, for sweepers."""


class Parser(argparse.ArgumentParser):
    """Options of a console script; a wrong one is answered with one sentence, not with the usage of all."""

    def error(self, message: str) -> NoReturn:
        sys.exit(report(self.prog, f"{message}; --help lists what can be given", 2))


class _Reported(Exception):
    """Its sentence was printed already; carries the exit status."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class SweepEnded(BaseException):
    """A sweep starts no further run: not an Exception, for a sweeper may go on after those."""


class _Stopped(BaseException):
    """Ctrl-C or SIGTERM, reported already: not an Exception, for Hydra goes on with a multirun after those."""


def train() -> None:
    """Console script `velora-train`."""
    if any(argument.startswith("table=") for argument in sys.argv[1:]):
        sys.exit(_tables())
    sys.exit(launch("velora-train", run_and_score, sweeps=True))


def _tables() -> int:
    """Whole tables of the paper (velora/tables/)."""
    from velora.tables.run import run_tables

    try:
        return run_tables(sys.argv[1:])
    except ConfigError as error:
        return report("velora-train", str(error), 2)


def run_and_score(config: Config) -> float | None:
    """One run; returns the score that its `objective` names."""
    from velora.run.run import train

    return score_of(train(config), config.objective)


def score_of(record: dict[str, Any], objective: str | None) -> float | None:
    """The score that `objective` names in a record; ConfigError names those that are there."""
    if objective is None:
        return None
    scores = flatten({"metrics": record["metrics"]})
    if objective not in scores:
        raise ConfigError(
            f"objective={objective} is not a score of this run, whose record is written; its scores are {', '.join(scores)}"
        )
    return scores[objective]


def launch(program: str, job: Job, *, sweeps: bool = False, stopped: int = 1) -> int:
    """Compose the configuration from sys.argv and run `job` on it (once, or once for each point of a multirun).

    Hydra gets what `job` returns, so that a sweeper can look for the best. Returns the exit status: 0 done, 2 the
    configuration or the data is wrong, `stopped` after Ctrl-C or SIGTERM, 1 anything else. In a multirun the other points still
    run, and the status of the first one that failed is returned; Ctrl-C and SIGTERM end a multirun too. With `sweeps` a
    multirun is a sweep (velora/sweep/), each run of it in a process of its own, unless the command line names a launcher.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig

    try:
        check_processes()
        sys.argv[1:], folders = checked(sys.argv[1:])
    except ConfigError as error:
        return report(program, str(error), 2)
    sweep = _sweep(folders) if sweeps else None
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands us its exceptions instead of printing them and exiting with 1
    status = 0

    def run_one(composed: Any) -> float | None:
        nonlocal status
        failed, score = _guarded(program, job, composed, folders)
        status = status or failed
        if failed and HydraConfig.get().runtime.choices["hydra/launcher"] != "basic":
            raise _Reported(failed)  # the way that launchers of other processes report a failed job
        return score

    try:
        with one_sentence(folders):
            hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(run_one)()
    except _Stopped:
        return stopped
    except _Reported as reported:
        return reported.status
    except SweepEnded:
        pass
    except ConfigError as error:
        status = report(program, str(error), 2)
    return (sweep.close() if sweep is not None else 0) or status


def _sweep(folders: Sequence[Path]) -> Sweeps | None:
    """For a multirun of one process: what Hydra is to hand its runs to, made known to it. None where it keeps its own launcher."""
    options = arguments_of(sys.argv[1:])
    chosen = any(override.lstrip("+").startswith("hydra/launcher=") for override in options.overrides)
    if not options.multirun or chosen or num_processes() > 1:
        return None
    from velora.sweep.launcher import NAME, Sweeps

    own = [] if options.config_dir is None else ["--config-dir", options.config_dir]
    sweeps = Sweeps(own, folders, score_of)
    sweeps.register()
    sys.argv.append(f"hydra/launcher={NAME}")
    return sweeps


def _guarded(program: str, job: Job, composed: Any, folders: Sequence[Path]) -> tuple[int, float | None]:
    """Run one job; whatever goes wrong is one sentence on stderr. Returns the exit status and the job's score."""
    try:
        with one_sentence(folders):
            config = configured(composed, _overrides(), folders)
        return 0, job(config)
    except (KeyboardInterrupt, Interrupted) as error:
        report(program, str(error) or "stopped by Ctrl-C before the run had started", 1)
        raise _Stopped from None
    except ConfigError as error:
        return report(program, str(error), 2), None
    except RunError as error:
        return report(program, str(error), 1), None


def _overrides() -> list[str]:
    """The overrides of this job as they were given: one may hold a ${...}, which is not ours to resolve."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    given = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    assert isinstance(given, list)
    return [str(override) for override in given]


def report(program: str, text: str, status: int) -> int:
    """One line, whatever the text holds; on a terminal it takes the line of a progress bar that was left open."""
    fresh_line = "\r\x1b[K" if sys.stderr.isatty() else ""
    print(f"{fresh_line}{program}: {' '.join(text.split())}", file=sys.stderr)
    return status
