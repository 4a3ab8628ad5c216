"""The folder of one run and what is written into it.

    runs/<name>/seed<k>/config.yaml      the composed configuration, written first
                        metrics.jsonl    one line per logged step and per evaluation
                        result.json      the record, written last, in one move, also when the run fails
                        checkpoint-*/    while the run goes on (velora/run/checkpoints.py)
                        mmlu/            the answers to a benchmark's questions, one line each (velora/eval/mmlu.py)

The folder is the identity of a run (name and seed, no timestamp): an identical finished run is not run again, an
interrupted one is continued, and another configuration under the same name is refused. A folder is a run of ours if our
config.yaml stands in it; any other is neither emptied nor continued. No torch here.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import yaml

from velora.config.run import Config, differing_keys
from velora.errors import ConfigError, RunError
from velora.run import checkpoints
from velora.run.environment import git_state, versions
from velora.run.files import why, write_whole
from velora.run.notes import note
from velora.run.schema import (
    OF_SHAPES,
    Memory,
    MetricsLine,
    Parameters,
    Result,
    Speed,
    check,
    plain_json,
    read_config,
    read_metrics,
    read_result,
)
from velora.run.tracker import Tracker


class Run:
    """The folder of one run. ConfigError, before anything is written, where it cannot be used.

    Reasons are a run of another configuration, files that are not ours or cannot be read, another process that is writing,
    a disk that cannot be written. A write that fails later is a RunError. Under several processes only rank 0 writes.
    With `look` nobody does: it is only asked whether the folder can be used.
    """

    def __init__(self, config: Config, look: bool = False) -> None:
        self.config = config
        self.folder = config.folder
        self.writes = os.environ.get("RANK", "0") == "0" and not look
        self._replaces = config.overwrite or config.resume == "never"
        self._lock: IO[str] | None = None
        self.tracker = Tracker()
        self.started = False
        with self._at_the_start():
            self._refuse()
            if self.writes and not self.is_finished():
                self._take_folder()
                self._refuse()  # again, for another process may have written until we had the lock
            if self.writes and self.is_finished():
                self._remove_checkpoints()  # it was stopped between its record and this

    @property
    def metrics_file(self) -> Path:
        return self.folder / "metrics.jsonl"

    def is_finished(self) -> bool:
        result = self._result()
        return not self.config.overwrite and result is not None and result.status == "ok"

    def last_checkpoint(self, phase: str = "") -> Path | None:
        """The newest whole checkpoint of a phase, or None; reads all of it to be sure.

        A newer one that is damaged, or that was not written to its end, is said and passed over. With `resume=required` a
        damaged one is a ConfigError; an unfinished one is what every kill may leave, and is passed over as well.
        """
        if self._replaces:
            return None
        found, damaged = checkpoints.newest_whole(self.folder / phase)
        for path, sentence in damaged.items():
            if self.config.resume == "required" and checkpoints.has_manifest(path):
                raise ConfigError(self._required(sentence))
        if damaged and self.writes:
            instead = f"{found} is used in its place" if found else "there is no whole one, so training starts again"
            print(f"{'; '.join(damaged.values())}; {instead}")
        return found

    def holds_results(self) -> bool:
        """Whether an earlier attempt has left anything that it would be a pity to lose."""
        return self.metrics_file.exists() or (self.folder / "result.json").exists() or bool(self._checkpoints())

    def has_checkpoint(self) -> bool:
        """Whether any phase has a checkpoint to continue from (going by names and sizes of its files)."""
        return any(not checkpoints.damage(path, checksums=False) for path in self._checkpoints())

    def answers_file(self, step: int) -> Path:
        """Where the benchmark after `step` steps keeps its answers; an interrupted one continues from them."""
        return self.folder / "mmlu" / f"step-{step}.jsonl"

    def has_answers(self) -> bool:
        return any(self.folder.glob("mmlu/step-*.jsonl"))

    def start(self) -> None:
        """Clear what `overwrite` or `resume=never` gives up, and write the configuration."""
        self.started = True
        if not self.writes:
            return
        assert not self.is_finished(), "a finished run is not started again"
        with self._at_the_start():
            if self._replaces:
                self._empty()
            write_whole(self.folder / "config.yaml", yaml.safe_dump(self.config.raw, sort_keys=False))
            (self.folder / "result.json").unlink(missing_ok=True)

    def release(self) -> None:
        """Let other processes write the folder; the end of the process does it too."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def rewind_metrics(self, phase: str, step: int) -> None:
        """Drop the lines after `step` of `phase`, which a resumed run writes again, and say which others cannot be read.

        Half a line at the end is what a kill leaves; it goes without a word.
        """
        if not self.writes or not self.metrics_file.exists():
            return
        with self._while_running(self.metrics_file):
            cut = not self.metrics_file.read_bytes().endswith(b"\n")
            lines, problems = read_metrics(self.metrics_file)
            if problems[: len(problems) - cut]:
                print(f"{self.metrics_file}: left out what is no line of ours: {'; '.join(problems[:3])}")
            kept = [line for line in lines if line["phase"] != phase or line["step"] <= step]
            write_whole(self.metrics_file, "".join(json.dumps(line) + "\n" for line in kept))

    def log(self, line: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl. RunError where it cannot be written, or holds something other than numbers."""
        if not self.writes:
            return
        line = plain_json(line)
        try:
            check(MetricsLine, line)
        except ValueError as error:
            raise RunError(f"the metric {error}; a score is a number") from None
        with self._while_running(self.metrics_file), self.metrics_file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.tracker.log(line)

    def seal(self, step: int, phase: str = "") -> None:
        """After all processes have written checkpoint-<step> of a phase: write its manifest, then remove older ones."""
        if self.writes:
            folder = self.folder / phase / f"checkpoint-{step}"
            with self._while_running(folder):
                checkpoints.write_manifest(folder)
            checkpoints.rotate(self.folder / phase, step)

    def keep_traceback(self, text: str) -> Path | None:
        """Write traceback.txt and return where it is; None where it cannot be written, for the fault itself says more."""
        try:
            write_whole(self.folder / "traceback.txt", text)
        except OSError:
            return None
        return self.folder / "traceback.txt"

    def finish(self, status: str, error: str | None, parts: dict[str, Any]) -> dict[str, Any]:
        """Write result.json (`velora.run.schema.Result`) and return it; `parts` holds what was measured.

        RunError where the record of a run that went well cannot be written; its checkpoints then stay. The record of a
        run that failed hides no fault by another one: if it cannot be written, stderr says so and that is all.
        """
        record = self._record(status, error, parts)
        try:
            check(Result, record)
        except ValueError as problem:
            sentence = f"what was measured does not fit into result.json ({problem})"
            if status != "ok":
                return self.finish(status, f"{error}; {sentence}", {})
            self.finish("failed", sentence, {})
            raise RunError(sentence) from None
        if not self.writes:
            return record
        self.tracker.finish(status)
        file = self.folder / "result.json"
        try:
            write_whole(file, json.dumps(record, indent=2, default=str) + "\n")
        except OSError as problem:
            sentence = f"{file} cannot be written ({why(problem)})"
            if status == "ok":
                raise RunError(f"{sentence}; make room there and give the same command again") from None
            print(sentence, file=sys.stderr)
        if status == "ok":
            self._remove_checkpoints()
        return record

    def _record(self, status: str, error: str | None, parts: dict[str, Any]) -> dict[str, Any]:
        config = self.config
        metrics = dict(parts.get("metrics", {}))

        def chosen(part: str, keys: Any) -> dict[str, Any]:
            found = {key: parts.get(part, {}).get(key) for key in keys}
            return {key: value for key, value in found.items() if value is not None or key not in OF_SHAPES}

        return plain_json(
            {
                "name": config.name,
                "status": status,
                "error": error,
                "method": config.method.name,
                "model": config.model.name,
                "task": config.task.name,
                "seed": config.seed,
                "metrics": {**metrics, "best": metrics.get("best", {})},
                "memory": chosen("memory", Memory.model_fields),
                "speed": chosen("speed", Speed.model_fields),
                "parameters": chosen("parameters", Parameters.model_fields),
                "data": parts.get("data"),
                "device": parts.get("device"),
                "versions": versions(),
                "git": git_state(),
                "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
                "config": config.raw,
            }
        )

    # What is there before the run starts

    def _refuse(self) -> None:
        """ConfigError where this run must not use the folder as it is."""
        self._refuse_links()
        ours = self._earlier_config()
        if not self.config.overwrite:
            self._refuse_obstacles()
            self._refuse_other_run(ours)
        if self.config.resume == "required" and not self.is_finished():
            self._refuse_start()

    def _refuse_links(self) -> None:
        """What is emptied and cleared must lie below runs_dir in fact, not only by its path."""
        for path in (self.folder, *self.folder.parents):
            if path == self.config.runs_dir:
                break
            if path.is_symlink():
                raise ConfigError(
                    f"name={self.config.name} seed={self.config.seed}: {path} is a link to another place; give another "
                    "name=..., or as runs_dir= the place itself"
                )

    def _earlier_config(self) -> dict[str, Any] | None:
        """config.yaml of the run that the folder holds; None if it holds none and nothing that we would take for one."""
        found = sorted(p.name for p in self.folder.iterdir()) if self.folder.is_dir() else []
        file = self.folder / "config.yaml"
        if file.exists():  # looked for after the listing: rank 0 may write it meanwhile
            try:
                return read_config(file)
            except ValueError as error:
                raise ConfigError(
                    f"{file} is no configuration of velora-train ({error}), so this folder is neither continued nor "
                    "emptied; give another name=..., or move the folder away"
                ) from None
        if self._replaces:
            foreign = [n for n in found if n not in (".lock", "config.yaml.part")]
        else:
            run = ("metrics.jsonl", "result.json")
            foreign = [n for n in found if n in run or checkpoints.step_of(Path(n)) is not None]
        if foreign:
            raise ConfigError(
                f"{self.folder} holds {', '.join(foreign[:3])} but no config.yaml of velora-train, so it is neither "
                "continued nor emptied; give another name=..., or move the folder away"
            )
        return None

    def _refuse_obstacles(self) -> None:
        """Where the run will write files there are no folders, and no files where it will write checkpoints."""
        files = [self.metrics_file, self.folder / "result.json"]
        found = [(path, "folder") for path in files if path.exists() and not path.is_file()]
        entries = [*self.folder.glob("checkpoint-*"), *self.folder.glob("*/checkpoint-*")]
        found += [(p, "file") for p in entries if checkpoints.step_of(p) is not None and not p.is_dir()]
        if found:
            path, kind = found[0]
            raise ConfigError(f"{path} is a {kind}, and the run writes something else there; move it away")

    def _refuse_other_run(self, earlier: dict[str, Any] | None) -> None:
        """The configuration must be that of config.yaml, and that of the record where the run has finished."""
        begun = self.metrics_file.is_file() or bool(self._checkpoints())
        known = [earlier] if earlier and begun else []  # not begun: it never got to its first step, nothing is lost
        result = self._result()
        finished = result is not None and result.status == "ok"
        if result is not None and finished:
            known.append(result.config.model_dump(exclude_unset=True))
        changed = sorted({key for old in known for key in differing_keys(old, self.config.raw)})
        if changed and (finished or self.config.resume != "never"):
            raise ConfigError(
                f"name={self.config.name} seed={self.config.seed}: {self.folder} holds a run with another configuration "
                f"(different: {', '.join(changed[:6])}); give another name=..., or overwrite=true to replace it"
            )

    def _refuse_start(self) -> None:
        """For `resume=required`: there is a checkpoint, and the newest of each phase is not plainly damaged."""
        written = [path for path in self._checkpoints() if checkpoints.has_manifest(path)]
        if self.config.overwrite or not written:
            raise ConfigError(f"resume=required: {self.folder} holds no checkpoint to continue from; use resume=auto")
        newest = {path.parent: path for path in written}  # they come in the order of their steps: the last one stays
        for path in newest.values():
            if sentence := checkpoints.damage(path, checksums=False):
                raise ConfigError(self._required(sentence))

    @staticmethod
    def _required(sentence: str) -> str:
        return f"resume=required: {sentence}; resume=auto continues from the one before it, or starts again without one"

    def _result(self) -> Result | None:
        """The record that stands in the folder; ConfigError where something else stands in its place."""
        file = self.folder / "result.json"
        if not file.exists():
            return None
        try:
            return read_result(file)
        except ValueError as error:
            if self.config.overwrite or not file.exists():  # rank 0 removes that of an earlier attempt
                return None
            raise ConfigError(
                f"{file} is no record of velora-train ({error}); move it away to continue the run, or give overwrite=true"
            ) from None

    def _checkpoints(self) -> list[Path]:
        """Those of all phases: in the folder itself, or one below it for each phase."""
        if not self.folder.is_dir():
            return []
        folders = [self.folder, *sorted(p for p in self.folder.iterdir() if p.is_dir() and not p.is_symlink())]
        return [path for folder in folders for path in checkpoints.checkpoints(folder)]

    # Taking and clearing the folder

    @contextlib.contextmanager
    def _at_the_start(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"runs_dir={self.config.runs_dir}: {self.folder} cannot be written ({why(error)}); make room there or "
                "give another runs_dir="
            ) from None

    @contextlib.contextmanager
    def _while_running(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"{path} cannot be written ({why(error)}); make room there, and the same command continues the run"
            ) from None

    def _take_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / ".lock").open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"name={self.config.name} seed={self.config.seed}: another process is writing {self.folder}; "
                "wait for it or give another name="
            ) from None
        except OSError as error:
            note(f"{self.folder} cannot be locked ({why(error)}); do not start the same run twice")

    def _empty(self) -> None:
        """Everything but config.yaml, which says that the folder is ours until the new one takes its place."""
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name != "result.json"):
            if path.name in (".lock", "config.yaml"):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _remove_checkpoints(self) -> None:
        for path in self._checkpoints():
            checkpoints.remove(path)
