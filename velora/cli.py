"""The command line: compose with Hydra, check, hand over; every error ends in one sentence and an exit status.

Nothing here imports torch: `--help`, `--cfg job` and a refused configuration answer at once.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from velora.config import Config, validate
from velora.errors import ConfigError, RunError

# Overrides that choose where and how a run is kept, not what it computes: they do not enter its name.
_NOT_IDENTITY = {
    "seed", "name", "runs_dir", "resume", "overwrite", "data.root", "trainer.device", "trainer.num_workers",
    "trainer.save_every", "trainer.save_model", "trainer.log_every",
}  # fmt: skip


class _Reported(Exception):
    """Its sentence was printed already; carries the exit status."""

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

    Returns the exit status: 0 done, 2 the configuration or the data is wrong, 1 anything else.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands us its exceptions instead of printing them and exiting with 1

    def run_one(composed: Any) -> None:
        try:
            raw = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
            assert isinstance(raw, dict)
            overrides = list(HydraConfig.get().overrides.task)
            raw = {str(k): v for k, v in raw.items()}
            raw["name"] = raw.get("name") or default_name(raw, overrides)
            job(validate(raw))
        except KeyboardInterrupt:
            raise _Reported(_report(program, "stopped by Ctrl-C before the run had started", 1)) from None
        except ConfigError as error:
            raise _Reported(_report(program, str(error), 2)) from None
        except OmegaConfBaseException as error:
            raise _Reported(_report(program, _sentence(error), 2)) from None
        except RunError as error:
            raise _Reported(_report(program, str(error), 1)) from None

    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(run_one)()
    except _Reported as reported:
        return reported.status
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        return _report(program, _sentence(error), 2)
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


def _report(program: str, sentence: str, status: int) -> int:
    print(f"{program}: {sentence}", file=sys.stderr)
    return status


def _sentence(error: Exception) -> str:
    """Hydra's and OmegaConf's own messages, cut to what names the key, the value and the choices."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("full_key:", "object_type=", "reference_type="))]
    text = "; ".join(lines) or type(error).__name__
    if (missing := re.match(r"Could not find '(\w+)/([^']*)'; Available options in '\w+':", text)) is not None:
        group, value = missing.groups()
        options = ", ".join(lines[1:])
        return f"{group}={value} is not known; {group} is one of: {options}"
    if (unknown := re.search(r"Key '([\w.]+)' is not in struct", str(error))) is not None:
        full = re.search(r"full_key: ([\w.]+)", str(error))
        return f"{full.group(1) if full else unknown.group(1)} is not a key; `--cfg job` prints the keys of this configuration"
    if isinstance(error, Exception) and "Missing mandatory value" in text:
        key = text.rpartition(": ")[2]
        return f"{key} has no value; give {key}=..."
    return text
