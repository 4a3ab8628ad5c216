"""The tables of runs in README.md and docs/, from the records: `python docs/make_result_tables.py`.

A page says where and what: between `<!-- runs: FOLDER | TABLE; TABLE | COLUMN, COLUMN -->` and `<!-- end -->` stand columns of
the tables that `velora-report runs/records/FOLDER` prints under these titles; of several tables the first column names the task.
Between `<!-- paper: FOLDER -->` and `<!-- end -->` stand the paper's tables with the records of that folder in them, whole; with
`paper short` the rows alone.
"""

from __future__ import annotations

import re
from pathlib import Path

from velora.report.formats import markdown, markdown_tables, marked
from velora.report.paper_tables import paper_tables
from velora.report.records import read_records
from velora.report.table import Table
from velora.report.tables import run_tables

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "runs" / "records"
PAGES = ("README.md", "docs/results.md", "docs/tables.md")
_PLACE = re.compile(
    r"(<!-- runs: (?P<folder>[^|\n]+) \| (?P<tables>[^|\n]+) \| (?P<columns>[^|\n]+) -->\n).*?(<!-- end -->)", re.DOTALL
)
_PAPER = re.compile(r"(<!-- paper(?P<short> short)?: (?P<folder>[^|\n]+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)


def main() -> None:
    for page in PAGES:
        (ROOT / page).write_text(updated((ROOT / page).read_text()))
        print(page)


def updated(text: str, records: Path = RECORDS) -> str:
    """The page with its tables made again."""

    def with_table(found: re.Match[str]) -> str:
        tables = {table.title: table for table in run_tables(read_records(records / found["folder"])[0])}
        chosen = [tables[title] for title in found["tables"].split("; ")]
        return found[1] + _table(chosen, found["columns"].split(", ")) + found[5]

    def with_papers(found: re.Match[str]) -> str:
        tables = paper_tables(read_records(records / found["folder"])[0])
        if found["short"]:
            bare = (markdown(table.head, [[marked(cell) for cell in row] for row in table.rows]) for table in tables)
            return found[1] + "\n".join(bare) + found["end"]
        return found[1] + re.sub("^## ", "### ", markdown_tables(tables), flags=re.MULTILINE) + found["end"]

    return _PAPER.sub(with_papers, _PLACE.sub(with_table, text))


def _table(tables: list[Table], columns: list[str]) -> str:
    several = len(tables) > 1
    rows = []
    for table in tables:
        task = [table.title.partition(",")[0].rpartition("/")[2]] if several else []
        places = [table.head.index(column) for column in columns]
        rows += [[*task, *(marked(row[place]) for place in places)] for row in table.rows]
    about = "\n\n".join(dict.fromkeys(sentence for table in tables for sentence in table.about))
    return markdown([*(["task"] if several else []), *columns], rows) + f"\n{about}\n"


if __name__ == "__main__":
    main()
