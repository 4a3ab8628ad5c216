"""Tables and figures from records."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from statistics import stdev

import pytest

from velora.report.cli import report
from velora.report.records import Record, read_records
from velora.report.tables import markdown, tables
from velora.report.takeaway import takeaway
from velora.report.text import for_markdown, for_terminal, human_bytes, summary


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
    row = next(line for line in text.splitlines() if line.startswith("| lora "))
    assert [cell.strip() for cell in row.split("|")[2:5]] == ["diverged (a)", "-", "0.678"]  # the printed figure stays
    assert "\n(a) vtab_dtd-vit-lora, seed 0, diverged: loss is nan at step 3\n" in text


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


def test_what_an_experiment_says_about_itself_is_told_once(folder, capsys):
    said = {"experiment": {"name": "small", "note": "two rates\n  were tried | one seed"}}
    write(folder, "lora", 0, 0.5, 1.0, config=said)
    write(folder, "lora", 1, 0.5, 1.0, config=said)
    write(folder, "flora", 0, 0.5, 1.0, config={"experiment": {"name": "small", "note": ["no text"]}})
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
    write(folder, method, 0, 0.5, speed, metrics=scores, memory=memory, **changes)


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


RECORD = {
    "name": "vtab_dtd-vit-lora", "status": "ok", "error": None, "method": "lora", "model": "vit", "task": "vtab/dtd", "seed": 0,
    "metrics": {"accuracy": 0.5, "best": {"accuracy": 0.5, "step": 3, "epoch": 1.0}}, "memory": {"weights_bytes": 4},
    "speed": {"images_per_second": 1.0}, "parameters": {"total": 10, "trainable": 5}, "config": {"task": {"group": "natural"}},
}  # fmt: skip
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
    write(folder, "lora", 0, None, None, task="vtab/svhn", parameters={"total": None, "trainable": None}, config={})
    text = tables(read_records(folder)[0])
    row = next(line for line in text.split("## vtab/svhn")[1].splitlines() if "lora" in line)
    assert [cell.strip() for cell in row.split("|")[3:4]] == ["-"]


# Names in Markdown, in a terminal, in a figure and in a file name

NASTY = {
    "a|b": ("a|b", r"a\|b"),
    "two\nlines\r\n": ("two lines ", "two lines "),
    "<script>&amp;": ("<script>&amp;", "&lt;script&gt;&amp;amp;"),
    "\x1b[31mred\x07": (r"\x1b[31mred\x07", r"\\x1b\[31mred\\x07"),
    "[bold](http://x)": ("[bold](http://x)", r"\[bold\](http://x)"),
    "*a* `b` ~c~ \\": ("*a* `b` ~c~ \\", r"\*a\* \`b\` \~c\~ \\"),
    "velora_all": ("velora_all", "velora_all"),
    "_emphasis_ __init__": ("_emphasis_ __init__", r"\_emphasis\_ \_\_init\_\_"),
    "right\u202eleft\u2028next\ud83d": (r"right\u202eleft next\ud83d", r"right\\u202eleft next\\ud83d"),
    "Größe ±": ("Größe ±", "Größe ±"),
}


@pytest.mark.parametrize("text", NASTY)
def test_escapes(text):
    assert (for_terminal(text), for_markdown(text)) == NASTY[text]
    cells = markdown(["head"], [[text]]).splitlines()
    assert len(cells) == 3
    assert re.sub(r"\\.", "", cells[2]).count("|") == 2


NAMES = [
    "../../etc/x",
    "a/../..",
    ".",
    "a" * 300,
    "ä" * 300,
    "x|y\n\x1b[2J<b>",
    "$\\frac{",
    "_hidden",
    "a b",
    "a_b",
    "a/b",
]


def test_names_of_every_kind_in_tables_figures_and_files(folder, capsys):
    for number, name in enumerate(NAMES):
        place = folder / f"nasty{number}"
        place.mkdir()
        record = {**RECORD, "task": name, "method": name, "name": name, "model": "vit"}
        (place / "result.json").write_text(json.dumps(record))
        (place / "metrics.jsonl").write_text('{"phase": "train", "step": 1, "loss": 1.0}\n')
    out = folder / "out"
    assert report(folder, out, figures=True) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "\x1b" not in said.out
    text = (out / "report.md").read_text()
    assert "\x1b" not in text
    assert "<b>" not in text
    images = re.findall(r"^!\[.*\]\((.*)\)$", text, re.MULTILINE)
    assert len(set(images)) == len(images) == len(NAMES) + 1
    assert {p.name for p in out.iterdir()} == {*images, "report.md"}


def test_errors_of_records_stay_in_their_cell(folder):
    write(folder, "lora", 0, 0.0, 1.0, status="failed", error="bad | worse\n\x1b[31m<b>")
    row = next(line for line in tables(read_records(folder)[0]).splitlines() if "worse" in line)
    assert r"bad \| worse \\x1b\[31m&lt;b&gt;" in row


def test_summary_has_no_escape_sequences(folder):
    values = read_records(folder)[0][0].values
    assert "\x1b" not in summary({**values, "task": "\x1b[2J"})


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
