"""The command line: compose with Hydra, check, hand over; every error ends in one sentence and an exit status.

Nothing here imports torch: `--help`, `--cfg job` and a refused configuration answer at once.
"""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from velora.config import Config, unknown_key, unknown_value, validate
from velora.errors import ConfigError, Interrupted, RunError

# Overrides that choose where and how a run is kept, not what it computes: they do not enter its name.
_NOT_IDENTITY = {
    "seed", "name", "runs_dir", "resume", "overwrite", "data.root", "trainer.device",
    "trainer.save_every", "trainer.save_model", "trainer.log_every",
}  # fmt: skip


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


def conf_dir() -> Path:
    """The folder of the shipped configuration: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def train() -> None:
    """Console script `velora-train`."""

    def job(config: Config) -> None:
        from velora.record import Run

        run = Run(config)  # refuses a folder that cannot be written or holds another run, before the heavy imports
        if run.is_finished():
            print(f"{run.folder} holds this run already, finished; overwrite=true runs it again")
            return
        from velora.run import execute

        execute(config, run)

    sys.exit(launch("velora-train", job))


def launch(program: str, job: Callable[[Config], None]) -> int:
    """Compose the configuration from sys.argv and run `job` on it (once, or once for each point of a multirun).

    Returns the exit status: 0 done, 2 the configuration or the data is wrong, 1 anything else. In a multirun the other points
    still run, and the status of the first one that failed is returned; Ctrl-C and SIGTERM end a multirun too.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf.errors import OmegaConfBaseException

    try:
        sys.argv[1:] = expand_globs(sys.argv[1:])
    except ConfigError as error:
        return _report(program, str(error), 2)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands us its exceptions instead of printing them and exiting with 1
    status = 0

    def run_one(composed: Any) -> None:
        nonlocal status
        status = _guarded(program, job, composed, list(HydraConfig.get().overrides.task))
        if status and HydraConfig.get().mode == RunMode.MULTIRUN:
            raise _Reported(status)  # the way that every launcher, also one of other processes, reports a failed job

    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(run_one)()
    except (_Reported, _Stopped) as reported:
        return reported.status
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        return _report(program, _sentence(error), 2)
    return status


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
        raise _Stopped(_report(program, str(error) or "stopped by Ctrl-C before the run had started", 1)) from None
    except ConfigError as error:
        return _report(program, str(error), 2)
    except OmegaConfBaseException as error:
        return _report(program, _sentence(error), 2)
    except RunError as error:
        return _report(program, str(error), 1)
    return 0


def expand_globs(arguments: list[str]) -> list[str]:
    """Write `group=glob(pattern)` as a comma list, also for nested values: `task=glob(vtab/*)`.

    Hydra's own glob sees one level only, and a pattern that matches nothing runs nothing and reports success. Raises
    ConfigError for such a pattern. What is no group, or has `exclude`, is left to Hydra.
    """
    own = [Path(b) for a, b in itertools.pairwise(arguments) if a in ("--config-dir", "-cd")]
    own += [Path(a.partition("=")[2]) for a in arguments if a.startswith("--config-dir=")]
    expanded = []
    for argument in arguments:
        found = re.fullmatch(r"(\w+)=glob\(([^,()]+)\)", argument)
        folders = [folder / found[1] for folder in (conf_dir(), *own)] if found else []
        if found and any(folder.is_dir() for folder in folders):
            group, pattern = found[1], found[2].strip("'\" ")
            known = {str(f.relative_to(folder).with_suffix("")) for folder in folders for f in folder.rglob("*.yaml")}
            level = [value for value in known if value.count("/") == pattern.count("/")]
            values = sorted(fnmatch.filter(level, pattern))
            if not values:
                raise ConfigError(f"{argument} matches nothing; {group} is one of {', '.join(sorted(known))}")
            argument = f"{group}={','.join(values)}"
        expanded.append(argument)
    return expanded


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


def _report(program: str, sentence: str, status: int) -> int:
    print(f"{program}: {sentence}", file=sys.stderr)
    return status


def _sentence(error: Exception) -> str:
    """Hydra's and OmegaConf's own messages, cut to what names the key, the value and the choices."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(line for line in lines if not line.startswith(("full_key:", "object_type=", "reference_type=")))
    if missing := re.search(r"Could not find '(\w+)/([^']*)'", text):
        group, value = missing.groups()
        listed = [
            line for line in lines[2:] if "=" not in line and not line.endswith(":")
        ]  # a user's own are among them
        shipped = conf_dir() / group
        known = {str(file.relative_to(shipped).with_suffix("")) for file in shipped.rglob("*.yaml")}
        return unknown_value(group, value, sorted(known | ({*listed} if "/" not in value else set())))
    if column := re.search(r"'experiment\.settings\.([^']+)\.\w+' not found", text):
        experiment = error.parent_node._get_root().experiment  # type: ignore[attr-defined]
        return f"experiment={experiment.name} has no settings for {column[1]}; it has {', '.join(experiment.settings)}"
    if mandatory := re.search(r"Missing mandatory value: ([\w.]+)", text):
        return f"{mandatory.group(1)} has no value; give {mandatory.group(1)}=..."
    if unknown := re.search(r"Could not override '([\w./@-]+)'", text) or re.search(r"full_key: ([\w.]+)", str(error)):
        key, keys = unknown.group(1), sorted(_shipped_keys())
        group = key.partition(".")[0]
        if key in keys:
            return (
                f"{key} is a key of another value of {group}, not of the one in this run; choose that with {group}=..."
            )
        return unknown_key(key, keys)
    return text or type(error).__name__


def _shipped_keys() -> set[str]:
    """Every group and every key that some shipped file sets, for "did you mean"."""
    import yaml

    keys: set[str] = set()
    for file in conf_dir().rglob("*.yaml"):
        content = yaml.safe_load(file.read_text()) or {}
        group = (
            "" if file.parent == conf_dir() or file.read_text().startswith("# @package _global_") else file.parent.name
        )
        for key, value in ({group: content} if group else content).items():
            keys.add(key)
            keys.update(f"{key}.{inner}" for inner in value) if isinstance(value, dict) else None
    return keys - {"defaults", "hydra"}
