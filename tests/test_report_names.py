"""Names of every kind in Markdown, in a terminal, in a figure and in a file name."""

from __future__ import annotations

import json
import re

import pytest
from report_helpers import RECORD, three_runs, write_vtab

from velora.report.cli import report
from velora.report.records import read_records
from velora.report.tables import markdown, tables
from velora.report.text import for_markdown, for_terminal, summary


@pytest.fixture
def folder(tmp_path):
    return three_runs(tmp_path)


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
    write_vtab(folder, "lora", 0, 0.0, 1.0, status="failed", error="bad | worse\n\x1b[31m<b>")
    row = next(line for line in tables(read_records(folder)[0]).splitlines() if "worse" in line)
    assert r"bad \| worse \\x1b\[31m&lt;b&gt;" in row


def test_summary_has_no_escape_sequences(folder):
    values = read_records(folder)[0][0].values
    assert "\x1b" not in summary({**values, "task": "\x1b[2J"})
