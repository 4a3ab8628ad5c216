"""Tables and figures from records."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import stdev

import pytest

from velora.report.records import read_records
from velora.report.tables import markdown, tables
from velora.report.text import human_bytes, summary


def write(folder: Path, method: str, seed: int, accuracy: float, speed: float, **changes) -> None:
    record = {
        "name": f"vtab_dtd-vit-{method}", "status": "ok", "error": None, "method": method, "model": "vit", "task": "vtab/dtd",
        "seed": seed, "metrics": {"accuracy": accuracy, "best": {"accuracy": accuracy, "step": 3, "epoch": 1.0}},
        "memory": {"saved_for_backward_bytes": 2**20, "weights_bytes": 2**21, "peak_allocated_bytes": None},
        "speed": {"images_per_second": speed}, "parameters": {"total": 10, "trainable": 5},
        "config": {"task": {"group": "natural"}, "experiment": {"paper": {"vtab/dtd": {"accuracy": 0.678}}}}, **changes,
    }  # fmt: skip
    place = folder / record["task"] / method / f"seed{seed}"
    place.mkdir(parents=True)
    (place / "result.json").write_text(json.dumps(record))
    lines = [{"phase": "train", "step": s, "loss": 1 / s} for s in (1, 2, 3)]
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, "full", 0, 0.5, 100.0)
    write(tmp_path, "full", 1, 0.7, 100.0)
    write(tmp_path, "velora", 0, 0.8, 125.0)
    return tmp_path


def test_seeds_are_one_row_with_their_spread(folder):
    records, unreadable = read_records(folder)
    assert not unreadable
    rows = {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")]
        for line in tables(records).splitlines()
        if "|" in line
    }
    head = rows["method"]
    assert rows["full"][head.index("accuracy")] == f"0.6 ± {stdev([0.5, 0.7]):.2g}"
    assert rows["full"][head.index("seeds")] == "2"
    assert rows["velora"][head.index("accuracy (paper)")] == "0.678"
    assert rows["velora"][head.index("images/s, full = 1")] == "1.25"
    assert "peak allocated" not in head  # measured nowhere: no empty column


def test_group_means_of_vtab(folder):
    write(folder, "velora", 0, 0.2, 1.0, task="vtab/svhn", config={"task": {"group": "natural"}, "experiment": None})
    write(
        folder,
        "velora",
        0,
        0.9,
        1.0,
        task="vtab/eurosat",
        config={"task": {"group": "specialized"}, "experiment": None},
    )
    text = tables(read_records(folder)[0])
    row = next(line for line in text.split("## VTAB-1k")[1].splitlines() if "velora" in line)
    cells = [c.strip() for c in row.split("|")][1:-1]
    assert cells == ["vit", "velora", "3", "0.5", "0.9", "-", f"{(0.8 + 0.2 + 0.9) / 3:.4g}"]


def test_failed_runs_are_named_and_enter_no_mean(folder):
    write(folder, "lora", 0, 0.0, 1.0, status="diverged", error="loss is nan at step 3")
    text = tables(read_records(folder)[0])
    assert "loss is nan at step 3" in text
    assert "| lora " not in text.split("## Runs without a result")[0]


def test_files_that_are_no_records(folder):
    (folder / "x").mkdir()
    (folder / "x" / "result.json").write_text('{"other": 1}')
    records, unreadable = read_records(folder)
    assert len(records) == 3
    assert [str(fault) for fault in unreadable] == [
        f"{folder}/x/result.json is no record of velora-train (name is missing, and 10 more); it is left out"
    ]


def test_figures(folder):
    from velora.report.figures import draw

    records, _ = read_records(folder)
    ((title, path),) = draw(records, folder)
    assert title == "vtab/dtd, vit"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert records[0].curve("loss") == ([1, 2, 3], [1.0, 0.5, 1 / 3])


def test_text():
    assert [human_bytes(n) for n in (None, 0, 1023, 1536, 2**20, 150 * 2**20, 3 * 2**40)] == [
        "-", "0 B", "1023 B", "1.5 KiB", "1 MiB", "150 MiB", "3 TiB",
    ]  # fmt: skip
    assert markdown(["a", "b"], [["1", "22"]]) == "| a | b  |\n|---|----|\n| 1 | 22 |\n"


def test_summary_of_a_record(folder):
    records, _ = read_records(folder)
    text = summary(records[0].values)
    assert "accuracy 0.5" in text
    assert "saved for backward 1 MiB" in text
