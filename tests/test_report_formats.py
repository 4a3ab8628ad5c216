"""The formats of a report, what is escaped in them, and the commands of `velora-report`."""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from report_helpers import write, write_row, write_sweep

from velora.report import cli
from velora.report.formats import csv_text, for_latex, latex_tables, markdown_tables
from velora.report.page import page, page_of
from velora.report.records import read_records
from velora.report.table import Cell, Notes, Table
from velora.report.tidy import HEAD, tidy

ROOT = Path(__file__).parent.parent
NASTY = [
    "<script>document.title='caught'</script>", "</script><b>bold", "\"><img src=x onerror=\"document.title='caught'\">",
    "a & b_c 100% #1 {x} $y$ ~ ^", r"\input{/etc/passwd} \\ \end{table}", "=1+1", "+cmd|' /C calc'!A0", "@SUM(A1)", "-2+3",
    "two\nlines", "\x1b[31mred", "{{ 7 * 7 }} {% raw %}", "right\u202eleft", "Größe ± \U0001f600 λ", "| pipe | [1] `code`", "--",
    "javascript:alert(1)", "'quoted' \"twice\"", "[2em] starts a row",
]  # fmt: skip


@pytest.fixture
def nasty(tmp_path):
    """Runs whose every text is hostile; one of them has no result."""
    for number, text in enumerate(NASTY):
        values = {"method": text, "task": text, "model": text, "device": text, "command": text, "lines": 3}
        write(
            tmp_path,
            f"run{number}",
            metrics={text: 0.5},
            config={"trainer.schedule": text, "experiment": {"name": "x", "note": text}},
            **values,
        )
        write(tmp_path, f"bad{number}", status="failed", error=text, **{**values, "method": "other"})
    return tmp_path


@pytest.fixture
def table():
    notes = Notes()
    mark = notes.mark("why")
    return Table(
        "Title",
        ["a", "b"],
        [[Cell("x", (mark,)), Cell("1.5", value=1.5)], [Cell("y"), Cell("-")]],
        ["about"],
        notes,
        {1},
        ["remark"],
    )


def test_markdown_of_a_table(table):
    assert markdown_tables([table]) == (
        "## Title\n\nabout\n\n| a     | b   |\n|-------|-----|\n| x (a) | 1.5 |\n| y     | -   |\n\n(a) why  \nremark\n"
    )


def test_latex_of_a_table(table):
    text = latex_tables([table])
    assert re.findall(r"\\(toprule|midrule|bottomrule)", text) == ["toprule", "midrule", "midrule", "bottomrule"]
    assert "x$^{a}$ & 1.5 \\\\\n\\midrule\ny & {-} \\\\" in text
    assert "$^{a}$ why\\par" in text


def test_csv_runs_no_formula():
    (read,) = csv.reader(io.StringIO(csv_text([[*NASTY, -1.5, 3, None, "-", "-2.5"]])))
    assert [text for text in read if text[:1] in "=+@\t" and text] == []
    assert [text for text in read if text.startswith("-")] == ["-1.5", "-", "-2.5"]
    assert read[NASTY.index("=1+1")] == "'=1+1"
    assert read[NASTY.index("two\nlines")] == "two lines"
    assert read[-3] == ""


def test_latex_has_no_command_of_a_record():
    text = for_latex(r"\input{x} 100% a_b #1 $y$ & ~^ -- 😀")
    assert text == (
        r"\textbackslash{}input\{x\} 100\% a\_b \#1 \$y\$ \& \textasciitilde{}\textasciicircum{} {-}{-} U+1F600"
    )


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX on this machine")
def test_latex_sets_what_the_records_hold(nasty):
    records, _ = read_records(nasty)
    assert cli.report(nasty, nasty, False, form="latex") == 0
    packages = (nasty / "report.tex").read_text().splitlines()[0].lstrip("% ")
    page = rf"\documentclass{{article}}{packages}\begin{{document}}\input{{report}}\end{{document}}"
    (nasty / "page.tex").write_text(page)
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"],
        cwd=nasty,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-1500:]
    assert len(records) == 2 * len(NASTY)


class _Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}


def test_page_has_no_tag_of_a_record(nasty, tmp_path_factory):
    plain = tmp_path_factory.mktemp("plain")
    for number in range(len(NASTY)):
        values = {"method": "a", "task": f"task{number}", "model": "b", "device": "c", "command": "d", "lines": 3}
        write(
            plain,
            f"run{number}",
            metrics={"e": 0.5},
            config={"trainer.schedule": "f", "experiment": {"name": "x", "note": f"n{number}"}},
            **values,
        )
        write(plain, f"bad{number}", status="failed", error="g", **{**values, "method": "other"})
    with_texts, without = (_Tags(page(read_records(folder)[0])) for folder in (nasty, plain))
    assert with_texts.tags == without.tags
    assert not {name for name in with_texts.attributes if name.startswith("on")}
    assert "\u202e" not in page(read_records(nasty)[0])


def test_page_names_no_address():
    """Nothing in it is loaded from elsewhere; the one address is in the licence line of uPlot."""
    text = page(read_records(ROOT / "runs" / "records")[0])
    assert set(re.findall(r"https?://[^\s\"'<)]+", text)) <= {
        "https://github.com/leeoniya/uPlot",
        "http://www.w3.org/2000/svg",
    }
    assert not re.search(r"<(link|img|iframe)\b|\bsrc=|@import|url\(", text)
    assert len(text) < 2_000_000  # 77 runs with their curves and configurations


def test_long_table_for_other_programs(tmp_path):
    for seed, score in enumerate((0.60, 0.62)):
        write_row(tmp_path, "full", "glue/cola", seed, score, memory={"peak_allocated_bytes": 5_000_000_000})
    write_row(tmp_path, "lora", "glue/cola", status="diverged", error="nan")
    records, _ = read_records(tmp_path)
    lines = [dict(zip(HEAD, line, strict=True)) for line in tidy(records, {})[1:]]
    score = next(
        line for line in lines if line["figure"] == "matthews_correlation" and line["row"] == "full" and line["mean"]
    )
    assert (score["paper"], score["seeds"], score["table"]) == (0.6224, 2, "table2")
    assert score["mean"] == pytest.approx(0.61)
    assert score["difference"] == pytest.approx(0.61 - 0.6224)
    assert score["standard_deviation"] == pytest.approx(0.02 / 2**0.5)
    memory = next(line for line in lines if line["figure"] == "memory_gb" and line["mean"])
    assert (memory["mean"], memory["paper"]) == (5.0, 4.64)
    lora = next(line for line in lines if line["row"] == "lora" and line["task"] == "glue/cola")
    assert (lora["status"], lora["error"], lora["seeds"], lora["mean"]) == ("diverged", "nan", 0, None)
    missing = {(line["row"], line["task"], line["figure"]) for line in lines if line["status"] == "missing"}
    assert missing == {(row, "glue/mrpc", figure) for row in ("full", "lora") for figure in ("f1", "memory_gb")}


# Commands


def run(*arguments: object, capsys) -> tuple[int, str, str]:
    """Exit status, what was printed, and what was complained about."""
    sys.argv = ["velora-report", *map(str, arguments)]
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


@pytest.mark.parametrize("form", cli.FORMATS)
def test_each_format_is_one_file(tmp_path, form, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [])
    write_sweep(tmp_path / "runs")
    status, said, wrong = run(
        tmp_path / "runs", "--format", form, "--no-figures", "--out", tmp_path / "out", capsys=capsys
    )
    assert (status, wrong) == (0, "")
    assert said.splitlines()[-1] == f"report: {tmp_path / 'out' / cli.FORMATS[form]}"
    assert [path.name for path in (tmp_path / "out").iterdir()] == [cli.FORMATS[form]]
    assert re.search(r"sub\\?_token\\?_size", (tmp_path / "out" / cli.FORMATS[form]).read_text())


def test_a_sweep_is_drawn(tmp_path):
    write_sweep(tmp_path / "runs")
    assert cli.report(tmp_path / "runs", tmp_path, figures=True) == 0
    text = (tmp_path / "report.md").read_text()
    images = re.findall(r"!\[(.*)\]\((.*)\)", text)
    assert [title for title, _ in images] == [
        "text, tiny",
        "text, tiny: accuracy and bytes against activations.sub_token_size",
    ]
    assert all((tmp_path / file).read_bytes().startswith(b"\x89PNG") for _, file in images)


def test_the_command_and_the_configuration_behind_a_cell(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [])
    write_sweep(tmp_path, (8, 16), seed=3)
    status, said, _ = run(tmp_path, "--commands", "sub_token_size=16", capsys=capsys)
    assert status == 0
    assert said == (
        "text, tiny: velora, sub_token_size 16\n"
        "  seed 3, ok, cpu, 2 threads, commit 012345678\n"
        "    velora-train sweep/velora-activations.sub_token_size=16\n"
        f"    in {tmp_path}/sweep/velora-activations.sub_token_size=16/seed3\n"
        "  configuration\n"
        "    trainer: max_steps=100\n"
        "    activations: kind=velora sub_token_size=16\n"
    )
    status, said, _ = run(tmp_path, "--commands", capsys=capsys)
    assert said.count("configuration") == 2
    status, said, wrong = run(tmp_path, "--commands", "galore", capsys=capsys)
    assert (status, said) == (2, "")
    assert wrong == "velora-report: --commands=galore: no title or command holds it; leave it out to see all\n"


def test_two_runs_side_by_side(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [])
    same = {"metrics": {"loss": 2.0}, "lines": 3}
    a = write(
        tmp_path,
        "a",
        config={"trainer.learning_rate": 1e-3},
        memory={"weights_bytes": 2**20, "gradients_bytes": 4},
        **same,
    )
    b = write(
        tmp_path,
        "b",
        config={"trainer.learning_rate": 5e-4},
        memory={"weights_bytes": 3 * 2**19, "gradients_bytes": 4},
        **same,
    )
    status, said, wrong = run("--compare", a, b, capsys=capsys)
    assert (status, wrong) == (0, "")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("| ")]
    assert lines == [
        ["", "A", "B", "B - A"],
        ["trainer.learning_rate", "0.001", "0.0005", ""],
        ["memory.weights_bytes", "1 MiB", "1.5 MiB", "+512 KiB (1.5 x)"],
    ]
    for form, start in (("csv", ",A,B,B - A\n"), ("latex", "% \\usepackage"), ("html", "<!DOCTYPE html>")):
        assert run("--compare", a, b, "--format", form, capsys=capsys)[1].startswith(start)


def test_two_groups_of_seeds_side_by_side(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [])
    for seed in range(3):
        write(tmp_path, "a", seed=seed, metrics={"accuracy": 0.5})
        write(tmp_path, "b", seed=seed, metrics={"accuracy": 0.5 + (seed + 1) / 100})
    status, said, _ = run("--compare", tmp_path / "a", tmp_path / "b", capsys=capsys)
    assert status == 0
    assert (
        "accuracy, B - A at the same seeds: +0.02 ± 0.01, n=3: paired t p=0.074" in said
    )  # differences 1, 2, 3 have 0.0742
    assert "(seed 0, 1, 2)" in said


def test_sides_that_are_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [])
    a = write(tmp_path, "a")
    write(tmp_path, "many/x", config={"trainer.learning_rate": 1e-3})
    write(tmp_path, "many/y", config={"trainer.learning_rate": 1e-4})
    for wrong_side, reason in (
        ("nowhere", "no readable result.json below"),
        ("many", "holds 2 runs that are not seeds of one configuration"),
    ):
        status, said, wrong = run("--compare", a, tmp_path / wrong_side, capsys=capsys)
        assert (status, said, wrong.count("\n")) == (2, "", 1)
        assert reason in wrong
        assert "give the folder of" in wrong


def test_records_of_the_repository_in_every_format(tmp_path):
    for form in cli.FORMATS:
        assert cli.report(ROOT / "runs" / "records", tmp_path, False, form=form) == 0
    read = list(csv.DictReader((tmp_path / "report.csv").open()))
    assert {line["task"] for line in read} >= {"manual", "glue/mrpc", "vtab/eurosat", "c4"}
    demo = [line for line in read if "records/demo/velora/" in line["folder"] and line["figure"] == "perplexity"]
    assert [float(line["mean"]) for line in demo] == [5.336986379575338]  # as in its result.json


# The page in a browser


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with Browser() as opened:
        yield opened


def test_page_in_a_browser(browser, tmp_path):
    write_sweep(tmp_path, (32, 8, 16))
    write_row(tmp_path, "full", "glue/cola", score=0.6)
    write_row(tmp_path, "full", "glue/mrpc", status="diverged", error="nan")
    file = tmp_path / "report.html"
    file.write_text(page(read_records(tmp_path)[0]))
    browser.open(file)
    assert browser.complaints() == []
    assert browser.requests() == [file.resolve().as_uri()]  # the page itself and nothing else
    assert browser("document.querySelectorAll('figure.chart canvas').length") == 3  # curves, frontier, sweep
    assert browser(
        "[...document.querySelectorAll('canvas')]"
        ".every(c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(v => v))"
    )
    table = "[...document.querySelectorAll('table')].find(t => t.tHead.textContent.includes('sub_token_size'))"
    column = f"[...{table}.querySelectorAll('tr.row')].map(row => row.cells[2].textContent)"
    assert browser(column) == ["8", "16", "32"]
    click = f"[...{table}.tHead.querySelectorAll('button')].find(b => b.textContent === '{{}}').click()"
    browser(click.format("accuracy"))
    assert browser(column) == ["32", "16", "8"]  # the score falls as the size grows
    browser(click.format("accuracy"))
    assert browser(column) == ["8", "16", "32"]
    browser(click.format("saved for backward"))
    assert browser(column) == ["32", "16", "8"]  # 125, 150, 200 MiB
    detail = f"{table}.querySelector('button.more').closest('tr').nextElementSibling"
    assert browser(f"{detail}.hidden") is True
    browser(f"{table}.querySelector('button.more').click()")
    assert browser(f"{detail}.hidden") is False
    assert "velora-train sweep/velora-activations.sub_token_size=32" in browser(
        f"{detail}.textContent"
    )  # it moved with its row
    browser("document.querySelector('figure.chart input').click()")
    assert browser("document.querySelectorAll('figure.chart canvas').length") == 3
    assert browser.complaints() == []


def test_legend_hides_a_method_with_its_validation_points(browser, tmp_path):
    write_sweep(tmp_path, (8, 16))
    file = tmp_path / "report.html"
    file.write_text(page(read_records(tmp_path)[0]))
    browser.open(file)
    shown = "[...document.querySelector('figure.chart').querySelectorAll('.u-series')].map(s => !s.matches('.u-off'))"
    assert browser(shown) == [True] * 5  # step, and training and validation of two runs
    browser("document.querySelector('figure.chart').querySelectorAll('.u-series .u-marker')[1].parentElement.click()")
    assert browser(shown) == [True, False, False, True, True]


def test_hostile_texts_in_a_browser(browser, nasty):
    file = nasty / "report.html"
    file.write_text(page(read_records(nasty)[0]))
    browser.open(file)
    assert browser.complaints() == []
    assert browser.requests() == [file.resolve().as_uri()]
    assert browser("document.title") == "velora-report"
    assert browser("document.querySelectorAll('main b, main img').length") == 0
    assert browser("document.querySelectorAll('h2')[0].textContent.length > 0")
    assert set(browser("[...document.querySelectorAll('h2')].map(h => h.textContent)")) >= {
        f"{t}, {t}" for t in NASTY if t.isprintable() and "\n" not in t
    }


def test_the_policy_of_the_page_stops_a_script_that_got_in(browser, tmp_path):
    """The check that a check is there: the same page with a script that escaping would have let through."""
    file = tmp_path / "report.html"
    file.write_text(page_of([], "t").replace("</body>", "<script>document.title = 'caught'</script></body>"))
    browser.open(file)
    assert browser("document.title") == "t"
    assert any(
        "Content Security Policy" in text or "content security policy" in text.lower() for text in browser.complaints()
    )
