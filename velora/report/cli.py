"""`velora-report [FOLDER]`: tables and figures from all records below a folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> None:
    """Console script `velora-report`."""
    parser = argparse.ArgumentParser(prog="velora-report", description=__doc__)
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("runs"), help="searched for result.json (default: runs)"
    )
    parser.add_argument("--out", type=Path, help="where report.md and the figures go (default: the folder itself)")
    parser.add_argument("--no-figures", action="store_true", help="tables only")
    arguments = parser.parse_args()
    sys.exit(report(arguments.folder, arguments.out or arguments.folder, not arguments.no_figures))


def report(folder: Path, out: Path, figures: bool) -> int:
    from velora.report.records import read_records
    from velora.report.tables import tables

    records, unreadable = read_records(folder)
    for path in unreadable:
        print(f"velora-report: {path} is no record of velora-train; it is left out", file=sys.stderr)
    if not records:
        print(
            f"velora-report: no result.json below {folder}; run velora-train first or name another folder",
            file=sys.stderr,
        )
        return 2
    text = tables(records)
    print(text)
    parts = [text]
    out.mkdir(parents=True, exist_ok=True)
    if figures:
        from velora.report.figures import draw

        for title, path in draw(records, out):
            print(f"{title}: {path}")
            parts.append(f"![{title}]({path.name})\n")
    (out / "report.md").write_text("\n".join(parts))
    print(f"report: {out / 'report.md'}")
    return 0
