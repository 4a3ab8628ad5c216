"""Records and metrics that are hurt, or none at all: each is named with its reason, and the report has the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_helpers import RECORD, three_runs, write_vtab

from velora.report.cli import report
from velora.report.records import read_records
from velora.report.tables import tables


@pytest.fixture
def folder(tmp_path):
    return three_runs(tmp_path)


def test_files_that_are_no_records(folder):
    (folder / "x").mkdir()
    (folder / "x" / "result.json").write_text('{"other": 1}')
    records, unreadable = read_records(folder)
    assert len(records) == 3
    assert [str(fault) for fault in unreadable] == [
        f"{folder}/x/result.json is no record of velora-train (name is missing, and 10 more); it is left out"
    ]


MALFORMED = {  # key -> values that a record cannot have there; each with the same reason
    "name": ([None, 3, "", ["a"], {}], "name="),
    "status": ([None, "done", 1, ["ok"], True], "status="),
    "error": ([3, ["x"], {}], "error="),
    "method": ([None, 1, "", []], "method="),
    "model": ([None, 1.5, ""], "model="),
    "task": ([None, 7, "", {"name": "x"}], "task="),
    "seed": ([None, "0", 1.5, True, -1, 10**30, [0]], "seed="),
    "metrics": ([None, "x", [1], {"accuracy": "0.5"}, {"accuracy": True}, {"accuracy": [0.5]}, {"accuracy": 10**400}], "metrics"),
    "metrics.best": ([0.5, None, [1], {"accuracy": "0.5"}, {"select": {"best": {"a": []}}}], "metrics"),
    "memory": ([None, "x", [], {"weights_bytes": "4"}, {"weights_bytes": 1.5}, {"optimizer_bytes": -4}], "memory"),
    "speed": ([None, 3, {"images_per_second": "fast"}, {"tokens_per_second": []}], "speed"),
    "parameters": ([None, [], {"trainable": "5"}, {"trainable": [5]}, {"total": True}], "parameters"),
    "config": ([None, [], "x", {"experiment": "x"}, {"task": []}, {"task": {"group": 3}}], "config"),
    "config.experiment": ([{"paper": p} for p in ([1], {"vtab/dtd": 0.5}, {"vtab/dtd": {"accuracy": "0.5"}})], "config.exp"),
    "versions": ([None, [], {"torch": 2}], "versions"),
    "git": ([[], {"dirty": "yes please"}], "git"),
}  # fmt: skip
CASES = [
    pytest.param(key, value, reason, id=f"{key}={str(value)[:30]}")
    for key, (values, reason) in MALFORMED.items()
    for value in values
]


@pytest.mark.parametrize(("key", "value", "reason"), CASES)
def test_malformed_record_is_named_and_left_out(folder, key, value, reason, capsys):
    record = json.loads(json.dumps(RECORD))
    *outer, last = key.split(".")
    place = record
    for part in outer:
        place = place[part]
    place[last] = value
    _put(folder, json.dumps(record))
    _reports_the_rest(folder, reason, capsys)


@pytest.mark.parametrize("key", [k for k in RECORD if k != "error"])
def test_missing_key(folder, key, capsys):
    _put(folder, json.dumps({k: v for k, v in RECORD.items() if k != key}))
    _reports_the_rest(folder, f"{key} is missing", capsys)


NO_JSON = {
    "empty": (b"", "it is not JSON"), "half": (b'{"name": "a', "it is not JSON"), "a list": (b"[]", "[]: input should be"),
    "null": (b"null", "None: input should be"), "a number": (b"3", "3: input should be"), "binary": (b"\xff", "it is not UTF-8"),
    "NaN": (b'{"seed": NaN}', "NaN is not JSON"), "infinity": (b'{"seed": -Infinity}', "-Infinity is not JSON"),
    "deep": (b"[" * 100_000, "it is nested too deep"), "5000 digits": (b'{"seed": ' + b"1" * 5000 + b"}", "Exceeds the limit"),
    "surrogate": (json.dumps({**RECORD, "name": "\ud83d"}).encode(), "name="),
}  # fmt: skip


@pytest.mark.parametrize(("content", "reason"), NO_JSON.values(), ids=NO_JSON)
def test_file_that_is_no_record(folder, content, reason, capsys):
    _put(folder, content)
    _reports_the_rest(folder, reason, capsys)


@pytest.mark.parametrize("kind", ["folder", "dangling link"])
def test_result_json_that_is_no_file(folder, kind, capsys):
    path = folder / "broken" / "result.json"
    path.parent.mkdir()
    path.mkdir() if kind == "folder" else path.symlink_to("nowhere")
    _reports_the_rest(folder, {"folder": "it is not a file"}.get(kind, "No such file or directory"), capsys)


def _put(folder: Path, content: str | bytes) -> None:
    (folder / "broken").mkdir()
    (folder / "broken" / "result.json").write_bytes(content if isinstance(content, bytes) else content.encode())


def _reports_the_rest(folder: Path, reason: str, capsys) -> None:
    assert report(folder, folder, figures=False) == 0
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith(f"velora-report: {folder}/broken/result.json is no record of velora-train (")
    assert reason in line
    assert line.endswith("; it is left out")
    assert "| full   | 2 " in said.out
    assert "lora " not in said.out.replace("velora ", "")


def test_nothing_but_broken_records(tmp_path, capsys):
    _put(tmp_path, b"[]")
    assert report(tmp_path, tmp_path, figures=False) == 2
    assert "no readable result.json below" in capsys.readouterr().err
    assert not (tmp_path / "report.md").exists()


def test_record_of_the_present_writer_and_of_the_repository(folder):
    """What `Run.finish` writes is what the report reads, and no record of the repository is refused."""
    records, faults = read_records(Path(__file__).parent.parent / "runs" / "records")
    assert len(records) > 50
    assert not faults


METRICS = {
    "cut": (b'{"phase": "train", "step": 1, "loss": 1.0}\n{"phase": "tr', "line 2: it is not JSON", ([1], [1.0])),
    "empty": (b"", "is empty", ([], [])),
    "a list": (b'[]\n{"phase": "train", "step": 1, "loss": 1.0}\n', "line 1: []: input should be", ([1], [1.0])),
    "a string": (b'{"phase": "train", "step": 1, "loss": "1"}\n', "line 1: loss='1': is not a number", ([], [])),
    "no phase": (b'{"step": 1, "loss": 1.0}\n', "line 1: phase is missing", ([], [])),
    "two": (b'{"phase": "train", "step": null}\nx\n', "line 1: step=None: input should be a valid integer and 1 more", ([], [])),
    "binary": (b"\x80\n", "line 1: it is not UTF-8", ([], [])),
    "missing": (None, "cannot be read (No such file or directory)", ([], [])),
}  # fmt: skip


@pytest.mark.parametrize(("content", "reason", "curve"), METRICS.values(), ids=METRICS)
def test_metrics_that_are_hurt_cost_only_the_curve(folder, content, reason, curve, capsys):
    file = folder / "vtab/dtd/full/seed0/metrics.jsonl"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    assert report(folder, folder, figures=True) == 0
    said = capsys.readouterr()
    assert f"velora-report: {file} " in said.err
    assert reason in said.err
    assert "| full   | 2 " in said.out
    records, _ = read_records(folder)
    assert next(r for r in records if r.folder == file.parent).curve("loss") == curve


def test_lines_that_cannot_be_drawn_to_scale(folder):
    file = folder / "vtab/dtd/full/seed0/metrics.jsonl"
    file.write_text(
        "".join(f'{{"phase": "train", "step": {s}, "loss": {v}}}\n' for s, v in ((1, 1e299), (2**62, -1e299)))
    )
    assert report(folder, folder, figures=True) == 0


def test_null_scores_and_figures(folder):
    write_vtab(
        folder, "lora", 0, None, None, task="vtab/svhn", parameters={"total": None, "trainable": None}, config={}
    )
    text = tables(read_records(folder)[0])
    row = next(line for line in text.split("## vtab/svhn")[1].splitlines() if "lora" in line)
    assert [cell.strip() for cell in row.split("|")[3:4]] == ["-"]
