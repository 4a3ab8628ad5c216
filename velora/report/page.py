"""All tables and charts as one HTML file that needs nothing else: no network, no folder beside it.

Jinja2 escapes whatever comes from records; the data of the charts are JSON in which no "<" stands. The page runs only its own
two scripts, named by their hashes in its content security policy, and may load nothing. uPlot draws the charts (MIT, 50 kB,
in `web/` as published), so that a page stays small enough to send by mail: the library of Plotly alone has four megabytes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from velora.report.charts import charts
from velora.report.differences import groups
from velora.report.paper_tables import paper_tables
from velora.report.records import Record
from velora.report.table import Table
from velora.report.tables import run_tables, said_by_experiments
from velora.report.text import for_terminal

_WEB = Path(__file__).parent / "web"


def page(records: list[Record], faults: Sequence[object] = (), title: str = "velora-report") -> str:
    """The page of a report."""
    status: dict[str, int] = {}
    for record in records:
        status[record.status] = status.get(record.status, 0) + 1
    drawn = {name: charts(group) for name, group in groups(records).items()}
    counts = [f"{number} {state}" for state, number in status.items()]
    return page_of(
        [*paper_tables(records), *run_tables(records)], title, drawn,
        about=[f"{len(records)} runs: {', '.join(counts)}.", *said_by_experiments(records)], faults=list(map(str, faults)),
    )  # fmt: skip


def page_of(
    tables: Sequence[Table], title: str, drawn: dict[str, list[dict[str, Any]]] | None = None, *,
    about: Sequence[str] = (), faults: Sequence[str] = (),
) -> str:  # fmt: skip
    """A page of tables; `drawn`: the charts below the table of that title."""
    scripts = [_read("uPlot.iife.min.js"), _read("page.js")]
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src {' '.join(_hash(script) for script in scripts)}"
    )
    return _template().render(
        tables=tables, title=title, charts=drawn or {}, about=about, faults=faults, policy=policy, scripts=scripts,
        styles=[_read("uPlot.min.css"), _read("page.css")],
    )  # fmt: skip


@cache
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_WEB), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["plain"] = for_terminal  # no control characters, no change of the direction of writing
    environment.filters["plain_lines"] = lambda text: "\n".join(map(for_terminal, text.split("\n")))
    return environment.get_template("page.html.jinja")


def _read(name: str) -> str:
    text = (_WEB / name).read_text(encoding="utf-8").strip()
    assert "</script" not in text, name
    return text


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
