"""`velora-report [FOLDER]`: tables and figures from all records below a folder.

    velora-report runs                            tables here, report.md and pictures beside the records
    velora-report runs --format html --out DIR    one page: tables to sort, curves, the command behind each row (also latex, csv)
    velora-report runs --commands lora            command and configuration behind each cell with "lora" in title or command
    velora-report --compare A B                   two run folders side by side, only what differs
    velora-report --status runs                   how far the sweeps below a folder are (docs/sweeps.md)

A result.json that is no record is named with the reason and left out. Exit status: 0 where at least one record was
reported, 2 where there was none or the report cannot be written.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from velora.report.records import Fault, Record

FORMATS = {"markdown": "report.md", "latex": "report.tex", "csv": "report.csv", "html": "report.html"}


def main() -> None:
    """Console script `velora-report`."""
    arguments = _parser().parse_args()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that has no "±"
    if arguments.status:
        from velora.sweep.status import print_status

        sys.exit(print_status(arguments.folder))
    if arguments.compare:
        a, b = arguments.compare
        sys.exit(compare(a, b, arguments.format))
    if arguments.compare_questions:
        sys.exit(compare_questions(*arguments.compare_questions))
    if arguments.commands is not None:
        sys.exit(commands(arguments.folder, arguments.commands))
    out = arguments.out or arguments.folder
    sys.exit(
        report(arguments.folder, out, not arguments.no_figures, takeaway=arguments.takeaway, form=arguments.format)
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="velora-report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("runs"), help="searched for result.json (default: runs)"
    )
    parser.add_argument("--format", choices=FORMATS, default="markdown", help="of the report (default: markdown)")
    parser.add_argument("--out", type=Path, help="where the report and the figures go (default: the folder itself)")
    parser.add_argument("--no-figures", action="store_true", help="tables only")
    parser.add_argument(
        "--takeaway",
        action="store_true",
        help="end with two sentences: what is kept at which speed, and what that costs",
    )
    parser.add_argument("--status", action="store_true", help="how far the sweeps below the folder are, and stop")
    parser.add_argument(
        "--compare-questions", nargs=2, type=Path, metavar=("A", "B"),
        help="two runs' folders (or their mmlu/step-*.jsonl): McNemar's test on the same questions, and no report",
    )  # fmt: skip
    parser.add_argument(
        "--commands", nargs="?", const="", metavar="TEXT",
        help="print the command and the configuration behind each cell (whose title or command has TEXT), and no report",
    )  # fmt: skip
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("A", "B"),
        help="print two runs side by side, only what differs, and no report; a folder with several seeds is compared over them",
    )  # fmt: skip
    return parser


def compare_questions(a: Path, b: Path) -> int:
    """Print the comparison; returns the exit status."""
    from velora.errors import ConfigError
    from velora.report.questions import answers_file, compare, comparison_text
    from velora.report.text import for_terminal

    try:
        a, b = answers_file(a), answers_file(b)
        text = comparison_text(a, b, compare(a, b))
    except ConfigError as error:
        print(f"velora-report: {for_terminal(str(error))}", file=sys.stderr)
        return 2
    print("\n".join(map(for_terminal, text.splitlines())))
    return 0


def report(folder: Path, out: Path, figures: bool, *, takeaway: bool = False, form: str = "markdown") -> int:
    """Write the report; in Markdown the tables are printed too, and figures drawn. Returns the exit status."""
    from velora.report.tables import notes, tables
    from velora.report.text import for_terminal

    records, faults = _read(folder)
    if not records:
        return 2
    if form == "markdown":
        print(tables(records, for_terminal))
    try:
        drawn = _write(records, faults, out, form, figures)
    except OSError as error:
        from velora.run.files import why

        print(f"velora-report: --out={out} cannot be written ({why(error)}); name another folder", file=sys.stderr)
        return 2
    for title, path in drawn:
        print(for_terminal(f"{title}: {path}"))
    print(f"report: {out / FORMATS[form]}")
    if form == "markdown":
        print(notes(records, for_terminal), end="")
    if takeaway:
        from velora.report.takeaway import takeaway as in_two_sentences

        print(in_two_sentences(records), end="")
    return 0


def _write(
    records: list[Record], faults: Sequence[Fault], out: Path, form: str, figures: bool
) -> list[tuple[str, Path]]:
    """The file of the report; returns the figures drawn beside it. OSError: not written."""
    from velora.report.text import for_markdown
    from velora.run.files import write_whole

    out.mkdir(parents=True, exist_ok=True)
    drawn: list[tuple[str, Path]] = []
    if form == "markdown" and figures:
        from velora.report.figures import draw

        drawn = draw(records, out)
    text = _text(records, faults, form)
    images = [f"![{for_markdown(title)}]({path.name})\n" for title, path in drawn]
    write_whole(out / FORMATS[form], "\n".join([text, *images]) if images else text)
    return drawn


def _text(records: list[Record], faults: Sequence[Fault], form: str) -> str:
    if form == "html":
        from velora.report.page import page

        return page(records, faults)
    if form == "csv":
        from velora.report.formats import csv_text
        from velora.report.tidy import tidy

        return csv_text(tidy(records))
    from velora.report.formats import latex_tables
    from velora.report.paper_tables import paper_tables
    from velora.report.tables import notes, run_tables, tables

    if form == "latex":
        return latex_tables([*paper_tables(records), *run_tables(records)])
    return f"{tables(records)}\n{notes(records)}"


def commands(folder: Path, pattern: str) -> int:
    """Print what stands behind each cell; returns the exit status."""
    from velora.report.commands import behind_cells
    from velora.report.text import for_terminal

    records, _ = _read(folder)
    if not records:
        return 2
    text = behind_cells(records, pattern)
    if not text:
        print(
            f"velora-report: --commands={pattern}: no title or command holds it; leave it out to see all",
            file=sys.stderr,
        )
        return 2
    print("\n".join(map(for_terminal, text.split("\n"))))
    return 0


def compare(a: Path, b: Path, form: str) -> int:
    """Print two runs side by side; returns the exit status."""
    from velora.errors import ConfigError
    from velora.report import compare as sides
    from velora.report.formats import csv_of, latex_tables, markdown_tables
    from velora.report.text import for_terminal

    try:
        table = sides.compare(a, b)
    except ConfigError as error:
        print(f"velora-report: {for_terminal(str(error))}", file=sys.stderr)
        return 2
    if form == "html":
        from velora.report.page import page_of

        print(page_of([table], table.title))
        return 0
    text = {"latex": lambda: latex_tables([table]), "csv": lambda: csv_of(table)}.get(form)
    print(text() if text else markdown_tables([table], for_terminal), end="")
    return 0


def _read(folder: Path) -> tuple[list[Record], list[Fault]]:
    """The records below a folder; what is wrong there is said on stderr."""
    from velora.report.records import read_records
    from velora.report.text import for_terminal

    records, faults = read_records(folder)
    for fault in faults:
        print(f"velora-report: {for_terminal(str(fault))}", file=sys.stderr)
    if not records:
        nothing = "no readable result.json" if faults else "no result.json"
        print(
            f"velora-report: {nothing} below {folder}; run velora-train first or name another folder", file=sys.stderr
        )
    return records, faults
