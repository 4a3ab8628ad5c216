"""Weights & Biases beside metrics.jsonl: the same lines, one wandb run for each run of ours.

Logging must never cost a training: whatever wandb raises is said once, and the run goes on. Where wandb.mode=online cannot
work (no API key, no answer), it logs offline instead, so that `wandb sync` can send it later.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from velora.config.run import Config
from velora.errors import first_line
from velora.run.notes import note

INIT_SECONDS = 30.0


class Tracker:
    """Off until `start`, and off for good after the first error."""

    def __init__(self) -> None:
        self._run: Any = None

    def start(self, config: Config, folder: Path) -> None:
        mode = config.wandb.mode
        if mode == "disabled":
            return
        if mode == "online" and not _has_key():
            note("wandb.mode=online: there is no API key (run `wandb login` once); logging offline")
            mode = "offline"
        if not self._try(lambda: self._open(config, folder, mode), give_up=mode == "offline"):
            self._try(lambda: self._open(config, folder, "offline"))

    def log(self, line: dict[str, Any]) -> None:
        """One line of metrics.jsonl; its keys get the phase in front where there are several."""
        if self._run is not None:
            values = {k: v for k, v in line.items() if k != "phase"}
            self._try(lambda: self._run.log({f"{line['phase']}/{k}": v for k, v in values.items()}))

    def finish(self, status: str) -> None:
        if self._run is not None:
            run, self._run = self._run, None
            self._try(lambda: run.finish(exit_code=0 if status == "ok" else 1))

    def _open(self, config: Config, folder: Path, mode: str) -> None:
        import wandb

        logging.getLogger("wandb").setLevel(logging.ERROR)
        self._run = wandb.init(
            project=config.wandb.project,
            entity=config.wandb.entity,
            name=f"{config.name}/seed{config.seed}",
            tags=config.wandb.tags,
            config=config.raw,
            dir=str(folder),
            mode=mode,  # type: ignore[arg-type]
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True, init_timeout=INIT_SECONDS),
        )

    def _try(self, action: Callable[[], Any], *, give_up: bool = True) -> bool:
        try:
            action()
            return True
        except Exception as error:
            what = "the run goes on without it" if give_up else "logging offline"
            note(f"wandb: {first_line(error)}; {what}")
            self._run = None
            return False


def _has_key() -> bool:
    """Whether wandb would find an API key; it asks for one on the terminal otherwise, and waits for ever."""
    import wandb

    try:
        return bool(wandb.setup().settings.api_key or wandb.api.api_key)
    except Exception:
        return False
