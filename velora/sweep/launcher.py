"""Hydra's part of a sweep: its sweeper asks a launcher to run a list of overrides, and gets their scores.

Any sweeper works: the product of comma lists, or one that learns from scores (Optuna), batch by batch. All runs of a batch are
composed and checked first; what is wrong with any of them is one listing, and nothing starts.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from velora.config.compose import configured, one_sentence
from velora.config.sweep import is_sweep_key, take_sweep
from velora.errors import ConfigError
from velora.run.record import Run
from velora.sweep.sweep import Planned, Sweep

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn

NAME = "velora"
"""The value of `hydra/launcher`."""

Score = Callable[[Path, str | None], float | None]

# What of Hydra's own settings concerns the sweep, and not the runs in it.
_OF_THE_SWEEP = re.compile(r"[+~]*hydra(/launcher|/sweeper|\.launcher|\.sweeper|\.sweep|\.mode)\b")


class Sweeps:
    """The sweep of this process, once Hydra has said what it is; `register` before `hydra.main`."""

    def __init__(
        self, options: list[str], folders: Sequence[Path], score: Callable[[dict[str, Any], str | None], Any]
    ) -> None:
        self._options, self._folders, self._score = options, folders, score
        self._sweep: Sweep | None = None
        self._status = 0

    def register(self) -> None:
        """Make Hydra know `hydra/launcher=velora`, which hands its batches to this object."""
        from hydra.core.config_store import ConfigStore
        from hydra.core.plugins import Plugins
        from hydra.plugins.launcher import Launcher

        sweeps = self

        class VeloraLauncher(Launcher):
            def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
                self._loader, self._config = hydra_context.config_loader, config

            def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
                return sweeps.launch(self._loader, self._config, [list(job) for job in job_overrides])

        # Hydra takes a launcher by its import path, and only from a package `hydra_plugins`; ours belongs to this object.
        module = ModuleType("hydra_plugins.velora")
        VeloraLauncher.__module__, VeloraLauncher.__qualname__ = module.__name__, "VeloraLauncher"
        module.__dict__["VeloraLauncher"] = VeloraLauncher
        with contextlib.suppress(ImportError):  # there is one where another plugin is installed
            importlib.import_module("hydra_plugins")
        package = ModuleType("hydra_plugins")
        package.__path__ = []  # Hydra walks through it
        sys.modules.setdefault("hydra_plugins", package)
        sys.modules[module.__name__] = module
        Plugins.instance().register(VeloraLauncher)
        target = f"{module.__name__}.VeloraLauncher"
        ConfigStore.instance().store(group="hydra/launcher", name=NAME, node={"_target_": target}, provider="velora")

    def launch(self, loader: Any, master: Any, jobs: list[list[str]]) -> list[JobReturn]:
        """Compose, check and run one batch; SweepEnded where no further one may start."""
        from hydra.core.utils import JobReturn, JobStatus

        from velora.cli import SweepEnded

        planned = self._planned(loader, master, jobs)
        if self._sweep is None:
            self._sweep = self._open(master)
        returns = []
        entries = self._sweep.run(planned)
        if self._sweep.is_stopping():
            raise SweepEnded
        for job, entry in zip(planned, entries, strict=True):
            score = self._score_of(job) if entry.status == "ok" else None
            done = JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED)
            done.return_value = score
            returns.append(done)
        return returns

    def close(self) -> int:
        """The table of all runs; returns the exit status."""
        status = self._sweep.close() if self._sweep is not None else 0
        return status or self._status

    def _open(self, master: Any) -> Sweep:
        from omegaconf import OmegaConf

        settings = take_sweep({"sweep": OmegaConf.to_container(master.sweep, resolve=True)})
        given = [str(o) for o in OmegaConf.to_container(master.hydra.overrides.hydra, resolve=False)]  # type: ignore[union-attr]
        own = [override for override in given if not _OF_THE_SWEEP.match(override)]
        folder = Path(str(master.runs_dir)) / ".sweep" / (settings.name or name_of(sys.argv[1:]))
        command = [
            Path(sys.argv[0]).name,
            *(argument for argument in sys.argv[1:] if argument != f"hydra/launcher={NAME}"),
        ]
        return Sweep(settings, folder, command, [*own, *self._options])

    def _planned(self, loader: Any, master: Any, jobs: list[list[str]]) -> list[Planned]:
        from hydra.core.utils import filter_overrides
        from omegaconf import open_dict

        planned: list[Planned] = []
        problems: list[tuple[str, str]] = []
        folders: dict[str, list[str]] = {}
        for job in jobs:
            overrides = [override for override in job if not is_sweep_key(override.partition("=")[0].lstrip("+~"))]
            try:
                with one_sentence(self._folders):
                    composed = loader.load_sweep_config(master, job)
                    with open_dict(composed):
                        del composed["hydra"]
                    config = configured(composed, filter_overrides(overrides), self._folders)
                Run(config, look=True)
                if (other := folders.setdefault(str(config.folder), overrides)) is not overrides:
                    raise ConfigError(
                        f"name={config.name} seed={config.seed}: {' '.join(other)} is the same run, in {config.folder}; "
                        "leave one of them out, or give a name=... that tells them apart, like name=x/${method.name}"
                    )
                planned.append(Planned(overrides, config))
            except ConfigError as error:
                problems.append((" ".join(overrides), str(error)))
        if problems:
            raise ConfigError(listing_of_runs(problems, len(jobs)))
        return planned

    def _score_of(self, job: Planned) -> float | None:
        from velora.cli import report
        from velora.run.schema import parse_json

        try:
            record = parse_json((job.config.folder / "result.json").read_bytes())
            return self._score(record, job.config.objective)
        except ConfigError as error:
            self._status = report("velora-train", str(error), 2)
            return None


def name_of(arguments: Sequence[str]) -> str:
    """The name of a sweep by what it runs: the same for the same overrides in any order, whatever its other settings are."""
    about = _what_is_run(arguments)
    swept = [o for o in about if "," in o or "(" in o] or about
    words = re.sub(r"[^\w.=+,-]+", "_", "-".join(swept)).strip("_.-")[:60]
    return f"{words}-{digest(arguments)}" if words else digest(arguments)


def digest(arguments: Sequence[str]) -> str:
    """Eight letters that are the same for the same runs."""
    return hashlib.sha256("\n".join(_what_is_run(arguments)).encode()).hexdigest()[:8]


def _what_is_run(arguments: Sequence[str]) -> list[str]:
    overrides = sorted(a for a in arguments if "=" in a and not a.startswith("-"))
    return [o for o in overrides if not is_sweep_key(o.partition("=")[0].lstrip("+~")) and not _OF_THE_SWEEP.match(o)]


def listing_of_runs(problems: list[tuple[str, str]], total: int) -> str:
    """One listing of the runs that cannot be started; a sentence that holds for several is said once."""
    said: dict[str, list[str]] = {}
    for overrides, sentence in problems:
        said.setdefault(sentence, []).append(overrides)
    if len(said) == 1 and len(problems) == total:
        return next(iter(said))
    parts = [f"{' | '.join(which)}: {sentence}" for sentence, which in said.items()]
    numbered = parts if len(parts) == 1 else [f"({i}) {part}" for i, part in enumerate(parts, 1)]
    return f"{len(problems)} of {total} runs are refused, so none was started: {'; '.join(numbered)}"
