"""The command line: compose with Hydra, check, hand over; every error ends in one sentence and an exit status.

Nothing here imports torch: `--help`, `--cfg job` and a refused configuration answer at once.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from velora.config.complaints import sentence
from velora.config.overrides import checked, conf_dir
from velora.config.processes import check_processes
from velora.config.run import Config, validate
from velora.errors import ConfigError, Interrupted, RunError

# Overrides that choose where and how a run is kept, not what it computes: they do not enter its name.
_NOT_IDENTITY = {
    "seed", "name", "runs_dir", "resume", "overwrite", "data.root", "trainer.device",
    "trainer.save_every", "trainer.save_model", "trainer.log_every",
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """Options of a console script; a wrong one is answered with one sentence, not with the usage of all."""

    def error(self, message: str) -> NoReturn:
        sys.exit(report(self.prog, f"{message}; --help lists what can be given", 2))


class _Reported(Exception):
    """Its sentence was printed already; carries the exit status."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class _Stopped(BaseException):
    """Ctrl-C or SIGTERM, reported already: not an Exception, for Hydra goes on with a multirun after those."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def train() -> None:
    """Console script `velora-train`."""

    def job(config: Config) -> None:
        from velora.run.record import Run

        run = Run(config)  # refuses a folder that cannot be written or holds another run, before the heavy imports
        if run.is_finished():
            print(f"{run.folder} holds this run already, finished; overwrite=true runs it again")
            return
        from velora.run.run import execute

        execute(config, run)

    sys.exit(launch("velora-train", job))


def launch(program: str, job: Callable[[Config], None]) -> int:
    """Compose the configuration from sys.argv and run `job` on it (once, or once for each point of a multirun).

    Returns the exit status: 0 done, 2 the configuration or the data is wrong, 1 anything else. In a multirun the other points
    still run, and the status of the first one that failed is returned; Ctrl-C and SIGTERM end a multirun too.
    """
    import hydra
    import yaml
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        check_processes()
        sys.argv[1:] = checked(sys.argv[1:])
    except ConfigError as error:
        return report(program, str(error), 2)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands us its exceptions instead of printing them and exiting with 1
    status = 0

    def run_one(composed: Any) -> None:
        nonlocal status
        failed = _guarded(program, job, composed, _overrides())
        status = status or failed
        if failed and HydraConfig.get().runtime.choices["hydra/launcher"] != "basic":
            raise _Reported(failed)  # the way that launchers of other processes report a failed job

    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(run_one)()
    except (_Reported, _Stopped) as reported:
        return reported.status
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        return report(program, sentence(error, _own_folders()), 2)
    return status


def _overrides() -> list[str]:
    """The overrides of this job as they were given: one may hold a ${...}, which is not ours to resolve."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    given = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    assert isinstance(given, list)
    return [str(override) for override in given]


def _own_folders() -> list[Path]:
    """The folders of --config-dir."""
    from hydra._internal.utils import get_args_parser

    options, _ = get_args_parser().parse_known_args()
    return [Path(options.config_dir)] if options.config_dir else []


def _guarded(program: str, job: Callable[[Config], None], composed: Any, overrides: list[str]) -> int:
    """Run one job; whatever goes wrong is one sentence on stderr and an exit status."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        container = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        assert isinstance(container, dict)
        raw = {str(k): v for k, v in container.items()}
        raw["name"] = raw.get("name") or default_name(raw, overrides)
        job(validate(raw))
    except (KeyboardInterrupt, Interrupted) as error:
        raise _Stopped(report(program, str(error) or "stopped by Ctrl-C before the run had started", 1)) from None
    except ConfigError as error:
        return report(program, str(error), 2)
    except OmegaConfBaseException as error:
        return report(program, sentence(error, _own_folders()), 2)
    except RunError as error:
        return report(program, str(error), 1)
    return 0


def default_name(raw: dict[str, Any], overrides: list[str]) -> str:
    """`<task>-<model>-<method>` and every further override that changes what is computed, in the order of the keys."""
    names = [_get(raw, group) for group in ("task", "model", "method")]
    base = "-".join(re.sub(r"[^\w.]+", "_", str(n)).strip("_") for n in names)
    if experiment := _get(raw, "experiment"):
        base = f"{experiment}-{base}"
    extra = []
    for override in sorted(overrides):
        key, _, value = override.lstrip("+~").partition("=")
        if (
            key in _NOT_IDENTITY
            or key.startswith(("wandb", "hydra"))
            or key in ("task", "model", "method", "experiment")
        ):
            continue
        extra.append(re.sub(r"[^\w.=+,-]+", "_", f"{key}={value}"))
    name = "-".join([base, *extra])
    if len(name) > 200:
        name = f"{name[:180]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return name


def _get(raw: dict[str, Any], group: str) -> str | None:
    section = raw.get(group)
    return section.get("name") if isinstance(section, dict) else None


def report(program: str, text: str, status: int) -> int:
    """One line, whatever the text holds; on a terminal it takes the line of a progress bar that was left open."""
    fresh_line = "\r\x1b[K" if sys.stderr.isatty() else ""
    print(f"{fresh_line}{program}: {' '.join(text.split())}", file=sys.stderr)
    return status
