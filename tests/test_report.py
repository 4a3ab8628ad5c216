"""Tables and figures from records, and where the report goes. Records that are hurt: test_report_malformed.py."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from statistics import stdev

import pytest
from report_helpers import three_runs, write_vtab

from velora.report.cli import report
from velora.report.records import Record, read_records
from velora.report.tables import markdown, tables
from velora.report.takeaway import takeaway
from velora.report.text import human_bytes, summary


@pytest.fixture
def folder(tmp_path):
    return three_runs(tmp_path)


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
    write_vtab(
        folder, "velora", 0, 0.2, 1.0, task="vtab/svhn", config={"task": {"group": "natural"}, "experiment": None}
    )
    write_vtab(
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
    write_vtab(folder, "lora", 0, 0.0, 1.0, status="diverged", error="loss is nan at step 3")
    text = tables(read_records(folder)[0])
    row = next(line for line in text.splitlines() if line.startswith("| lora "))
    assert [cell.strip() for cell in row.split("|")[2:5]] == ["diverged (a)", "-", "0.678"]  # the printed figure stays
    assert "\n(a) vtab_dtd-vit-lora, seed 0, diverged: loss is nan at step 3\n" in text


def test_figures(folder):
    from velora.report.figures import draw

    records, _ = read_records(folder)
    ((title, path),) = draw(records, folder)
    assert title == "vtab/dtd, vit"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert records[0].curve("loss") == ([1, 2, 3], [1.0, 0.5, 1 / 3])


def test_what_an_experiment_says_about_itself_is_told_once(folder, capsys):
    said = {"experiment": {"name": "small", "note": "two rates\n  were tried | one seed"}}
    write_vtab(folder, "lora", 0, 0.5, 1.0, config=said)
    write_vtab(folder, "lora", 1, 0.5, 1.0, config=said)
    write_vtab(folder, "flora", 0, 0.5, 1.0, config={"experiment": {"name": "small", "note": ["no text"]}})
    assert report(folder, folder, figures=False) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "small: two rates were tried | one seed"
    assert (folder / "report.md").read_text().endswith("\nsmall: two rates were tried \\| one seed\n")


@pytest.mark.parametrize(
    ("name", "method", "label"),
    [
        ("demo/velora_all", "velora_all", "velora_all"),
        ("demo/velora_all-lean", "velora_all", "velora_all (lean)"),
        ("table2/velora_full", "velora", "velora"),
        ("manual-llama-velora-activations.layers=all", "velora", "velora (activations.layers=all)"),
    ],
)
def test_labels(name, method, label):
    assert Record(Path(), {"name": name, "method": method}).label == label


def learned(folder: Path, method: str, kept: float, speed: float, loss: float, **changes) -> None:
    """A run that keeps `kept` MiB for backward and ends at a validation loss."""
    memory = {"saved_for_backward_bytes": int(kept * 2**20), "weights_bytes": 1}
    scores = {"loss": loss, "best": {"loss": loss, "step": 3, "epoch": 1.0}}
    write_vtab(folder, method, 0, 0.5, speed, metrics=scores, memory=memory, **changes)


def test_two_sentences_say_what_the_records_say(tmp_path, capsys):
    learned(tmp_path, "full", 100, 10.0, 2.0)
    learned(tmp_path, "small", 40, 9.8, 2.5)
    learned(tmp_path, "tiny", 10, 7.0, 2.001)
    learned(tmp_path, "large", 90, 20.0, 2.3)
    assert report(tmp_path, tmp_path, figures=False, takeaway=True) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "As fast as full training, small keeps 40% of its bytes for the backward pass at 0.98 of its speed; tiny keeps 10% of its "
        "bytes for the backward pass at 0.70 of its speed, the least of all. In these runs of one length and few seeds tiny "
        "learned as well as full training (a validation loss within 0.5% of its 2.000); small learned worse (2.500)."
    )


def test_two_sentences_where_nothing_is_gained(tmp_path):
    learned(tmp_path, "full", 100, 10.0, 2.0)
    learned(tmp_path, "a", 100, 10.0, 1.5)
    learned(tmp_path, "b", 80, 5.0, 2.5)
    said = takeaway(read_records(tmp_path)[0])
    assert said.startswith("Nothing here saves bytes at the speed of full training; b keeps 80% ")
    assert "few seeds nothing learned as well as full training" in said


def test_no_sentences_without_something_to_compare(folder):
    assert takeaway(read_records(folder)[0]) == ""


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


# Where the report goes


def test_out_that_is_a_file(folder, capsys):
    (folder / "taken").write_text("x")
    for out in (folder / "taken", folder / "taken" / "below"):
        assert report(folder, out, figures=False) == 2
        said = capsys.readouterr()
        assert re.fullmatch(rf"velora-report: --out={out} cannot be written \(.*\); name another folder\n", said.err)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("figures", [True, False])
def test_out_on_a_disk_that_is_full_or_read_only(folder, monkeypatch, number, figures, capsys):
    def failing(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", failing)
    out = folder / "out"
    assert report(folder, out, figures=figures) == 2
    assert f"--out={out} cannot be written ({os.strerror(number)}); name another folder" in capsys.readouterr().err
    assert not list(out.iterdir())
