"""Reading records back: one per run folder."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from velora.config.level import printed_for
from velora.run.files import why
from velora.run.schema import read_metrics, read_result


@dataclass(frozen=True)
class Record:
    """One result.json (`velora.run.schema.Result`, as a dictionary), where it lies, and its metrics.jsonl."""

    folder: Path
    values: dict[str, Any]
    lines: list[dict[str, Any]] = field(default_factory=list)
    cache: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    @property
    def scores(self) -> dict[str, float]:
        """The final scores; those of earlier phases and of the best epoch are left out."""
        return {k: v for k, v in self["metrics"].items() if not isinstance(v, dict)}

    def score(self, name: str) -> float | None:
        """A final score, or what it was after an epoch: `mmlu_micro_epoch_2`."""
        if name in self.scores:
            return self.scores[name]
        asked = re.fullmatch(r"(.+)_epoch_(\d+)", name)
        if asked is None:
            return None
        score, epoch = asked[1], int(asked[2])
        found = [x[score] for x in self.lines if x.get(score) is not None and abs((x.get("epoch") or 0) - epoch) < 0.05]
        last = (self["config"].get("trainer") or {}).get("num_epochs") == epoch
        return found[-1] if found else self.scores.get(score) if last else None

    @property
    def items_per_second(self) -> float | None:
        """Tokens or images, whichever the task counts."""
        return self["speed"].get("tokens_per_second") or self["speed"].get("images_per_second")

    @property
    def paper(self) -> dict[str, float]:
        """The figures that the paper prints for this run, if its experiment names any."""
        return dict(printed_for(self.printed, self["task"], self["model"]))

    @property
    def experiment(self) -> dict[str, Any]:
        return self["config"].get("experiment") or {}

    @property
    def printed(self) -> dict[str, dict[str, float]]:
        """The paper's figures for the whole row that this run belongs to, by column."""
        return self.experiment.get("paper") or {}

    @property
    def table(self) -> str | None:
        """The table of the paper that this run has a row of ("table2"), if any."""
        stated = self.experiment.get("table")
        return stated if isinstance(stated, str) else None

    @property
    def row(self) -> str:
        """The name of its row in that table."""
        return str(self.experiment.get("row") or str(self.experiment.get("name")).rpartition("/")[2])

    @property
    def level(self) -> str | None:
        """How far this run is the published one: `level` of its experiment, else as the experiment's folder says.

        A published row whose keys were changed on the command line is a level of its own.
        """
        level = level_of(self.experiment)
        changed = self._changed() if level == PUBLISHED else []
        return f"{PUBLISHED}, but with {', '.join(changed)}" if changed else level

    @property
    def outcome(self) -> str:
        """What became of a run without a result, in one sentence."""
        reason = f": {self['error']}" if self["error"] else ""
        return f"{self['name']}, seed {self['seed']}, {self.status}{reason}"

    @property
    def status(self) -> str:
        return str(self["status"]).replace("_", " ")

    @property
    def command(self) -> str:
        return str(self.values.get("command") or "")

    def _changed(self) -> list[str]:
        changed = changed_keys(self.command)
        if f"{self['task']} {self['model']}" not in self.printed:  # the model is no choice of a column here
            changed += re.findall(r"(?<![\w.])model=\S+", self.command)
        return changed

    @property
    def steps(self) -> int | None:
        """Optimiser steps of the last phase: those logged, else those of the configuration."""
        logged = [line["step"] for line in self.lines if line["phase"] == self.lines[-1]["phase"]]
        configured = (self["config"].get("trainer") or {}).get("max_steps")
        return max(logged, default=configured if isinstance(configured, int) else None)

    @property
    def note(self) -> str | None:
        """What the reader of this record should know, if its experiment says anything: its name, and its own words."""
        stated = self["config"].get("experiment") or {}
        note = stated.get("note")
        return f"{stated.get('name')}: {' '.join(note.split())}" if isinstance(note, str) else None

    @property
    def group(self) -> str | None:
        """The group of tasks that the task of this run belongs to, if any."""
        return (self["config"].get("task") or {}).get("group")

    @property
    def label(self) -> str:
        """The method, and what the name of the run says beyond task, model and method (a swept value)."""
        method, last = self["method"], self["name"].rpartition("/")[2]
        _, _, rest = self["name"].partition(f"-{method}")
        if last.startswith(f"{method}-"):  # named by hand: demo/velora_all-lean
            rest = last.removeprefix(method)
        return self["method"] + (f" ({rest.strip('-')})" if rest.strip("-") else "")

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one key of metrics.jsonl in the last phase."""
        lines = [x for x in self.lines if x["phase"] == self.lines[-1]["phase"] and x.get(key) is not None]
        return [line["step"] for line in lines], [line[key] for line in lines]


PUBLISHED = "as published"
_LEVELS = {"table": PUBLISHED, "figure": PUBLISHED, "short": "short", "memory": "memory", "smoke": "smoke"}
_CHANGES_NOTHING = re.compile(
    r"[+~]*(experiment(\.level)?|task|model|seed|name|level|data\.\w+|runs_dir|resume|overwrite|wandb\..*|hydra\..*|sweep\..*|objective"
    r"|model\.path|trainer\.(device|micro_batch_size|eval_batch_size|num_workers|save_\w+|log_every|measure_memory))$"
)


def level_of(experiment: dict[str, Any]) -> str | None:
    """The level that an experiment states, or that of its folder ("table2/full", "short/glue_minilm"); None for one's own runs."""
    stated, name = experiment.get("level"), str(experiment.get("name") or "")
    if isinstance(stated, str):
        return PUBLISHED if stated == "paper" else stated
    return _LEVELS.get(re.sub(r"\d.*", "", name.partition("/")[0]))


def changed_keys(command: str) -> list[str]:
    """The overrides of a command that move a published row away from what was published, as they were given."""
    words = re.findall(r"(?:^|\s)'?([+~]*[a-z_][\w.@/]*=\S+)", command)
    return [word.rstrip("'") for word in words if not _CHANGES_NOTHING.match(word.partition("=")[0])]


@dataclass(frozen=True)
class Fault:
    """A file that is not, or not wholly, what a run writes, and what that costs the report."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path} {self.reason}"


def read_records(folder: Path) -> tuple[list[Record], list[Fault]]:
    """All records below a folder in the order of their paths, and what is wrong with other files found there.

    A result.json that is no record is left out. A metrics.jsonl costs no figure of the tables: what is no line of ours is
    missing in the curve.
    """
    records, faults = [], []
    found = [
        Path(place, "result.json") for place, folders, files in os.walk(folder) if "result.json" in folders + files
    ]
    for path in sorted(found):  # folders and dangling links of this name too: they are named, not passed over
        try:
            values = read_result(path).model_dump()
        except ValueError as error:
            faults.append(Fault(path, f"is no record of velora-train ({error}); it is left out"))
            continue
        lines, reason = _metrics(path.parent / "metrics.jsonl")
        record = Record(path.parent, values, lines)
        if reason and values["status"] == "ok" and record.level != "memory":  # no curve is drawn of another one
            faults.append(Fault(path.parent / "metrics.jsonl", reason))
        records.append(record)
    return records, faults


def _metrics(file: Path) -> tuple[list[dict[str, Any]], str | None]:
    try:
        lines, problems = read_metrics(file)
    except OSError as error:
        return [], f"cannot be read ({why(error)}); the run is reported without its curve"
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        return lines, f"has lines that are none of velora-train ({problems[0]}{more}); its curve is drawn without them"
    return lines, None if lines else "is empty; the run is reported without its curve"
