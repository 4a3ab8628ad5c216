"""The tables of `velora-bench step` in README.md and docs/results.md, from the records: `python docs/make_step_tables.py`.

A page says where: between `<!-- step: MODEL -->` (all points; `step short:` those on the frontier) and `<!-- end -->`. A model
without a record keeps what stands there.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from velora.bench.step import title
from velora.report.tables import markdown

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "runs" / "records" / "bench"
PAGES = ("README.md", "docs/results.md")
_PLACE = re.compile(r"(<!-- step( short)?: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    for page in PAGES:
        (ROOT / page).write_text(updated(page))
        print(page)


def updated(page: str, text: str | None = None, records: Path = RECORDS) -> str:
    """The page with the tables of the records that exist."""

    def with_table(found: re.Match[str]) -> str:
        file = records / f"step_{found[3]}.json"
        if not file.is_file():
            return found[0]
        table = _table(json.loads(file.read_text()), short=bool(found[2]))
        picture = file.with_suffix(".png")
        if picture.is_file():
            here = (ROOT / page).parent
            table += f"\n![{found[3]}: bytes against time]({os.path.relpath(picture, here)})\n"
        return found[1] + table + found[4]

    return _PLACE.sub(with_table, (ROOT / page).read_text() if text is None else text)


def _table(record: dict[str, Any], short: bool) -> str:
    points = {name: point for name, point in record["points"].items() if point["on_frontier"] or not short}
    if short:
        points = dict(
            sorted({"exact": record["points"]["exact"], **points}.items(), key=lambda item: item[1]["time_ratio"])
        )
    head = ["point (* on the frontier)", "time / exact", "saved / exact", "saved", "peak / exact", "loss - exact"]
    rows = [
        [
            name + (" *" if point["on_frontier"] else ""), f"{point['time_ratio']:.2f}", f"{point['bytes_ratio']:.2f}",
            f"{point['saved_for_backward_bytes'] / 2**20:.1f} MiB", f"{point['peak_ratio']:.2f}", f"{point['loss_difference']:.1e}",
        ]
        for name, point in points.items()
    ]  # fmt: skip
    about = record["machine"]
    load = f"load average {about['load_average']:.1f} before and {about['load_average_after']:.1f} after"
    scaled = f"; for two cores: {', '.join(record['scaled_down'])}" if record["scaled_down"] else ""
    return f"{title(record)}; {load}{scaled}.\n\n" + markdown(head, rows, str)


if __name__ == "__main__":
    main()
