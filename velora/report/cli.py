"""`velora-report [FOLDER]`: tables and figures from all records below a folder.

A result.json that is no record is named with the reason and left out. Exit status: 0 where at least one record was
reported, 2 where there was none or the report cannot be written.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path


def main() -> None:
    """Console script `velora-report`."""
    parser = argparse.ArgumentParser(
        prog="velora-report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("runs"), help="searched for result.json (default: runs)"
    )
    parser.add_argument("--out", type=Path, help="where report.md and the figures go (default: the folder itself)")
    parser.add_argument("--no-figures", action="store_true", help="tables only")
    parser.add_argument(
        "--takeaway",
        action="store_true",
        help="end with two sentences: what is kept at which speed, and what that costs",
    )
    parser.add_argument("--status", action="store_true", help="how far the sweeps below the folder are, and stop")
    arguments = parser.parse_args()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that has no "±"
    if arguments.status:
        from velora.sweep.status import print_status

        sys.exit(print_status(arguments.folder))
    out = arguments.out or arguments.folder
    sys.exit(report(arguments.folder, out, not arguments.no_figures, takeaway=arguments.takeaway))


def report(folder: Path, out: Path, figures: bool, *, takeaway: bool = False) -> int:
    """Print the tables and write report.md and the figures; returns the exit status."""
    from velora.report.records import read_records
    from velora.report.tables import notes, tables
    from velora.report.text import for_markdown, for_terminal
    from velora.run.files import why, write_whole

    records, faults = read_records(folder)
    for fault in faults:
        print(f"velora-report: {for_terminal(str(fault))}", file=sys.stderr)
    if not records:
        nothing = "no readable result.json" if faults else "no result.json"
        print(
            f"velora-report: {nothing} below {folder}; run velora-train first or name another folder", file=sys.stderr
        )
        return 2
    print(tables(records, for_terminal))
    drawn: list[tuple[str, Path]] = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        if figures:
            from velora.report.figures import draw

            drawn = draw(records, out)
        images = [f"![{for_markdown(title)}]({path.name})\n" for title, path in drawn]
        write_whole(
            out / "report.md", "\n".join([tables(records, for_markdown), notes(records, for_markdown), *images])
        )
    except OSError as error:
        print(f"velora-report: --out={out} cannot be written ({why(error)}); name another folder", file=sys.stderr)
        return 2
    for title, path in drawn:
        print(for_terminal(f"{title}: {path}"))
    print(f"report: {out / 'report.md'}")
    print(notes(records, for_terminal), end="")
    if takeaway:
        from velora.report.takeaway import takeaway as in_two_sentences

        print(in_two_sentences(records), end="")
    return 0
