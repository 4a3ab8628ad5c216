"""What stands behind each cell: the command, the folder, the commit and the whole configuration of its runs."""

from __future__ import annotations

from collections.abc import Iterable

from velora.report.differences import everything, groups, points, shown
from velora.report.records import Record

_NOT_LISTED = {"name", "seed", "runs_dir", "resume", "overwrite", "objective"}


def behind_cells(records: Iterable[Record], pattern: str = "") -> str:
    """A paragraph for each cell (a row of a task and model, its seeds together) whose title or command holds `pattern`."""
    paragraphs = []
    for title, group in groups(records).items():
        keys, rows = points(group)
        for point in rows:
            heading = f"{title}: {point.label(keys)}"
            if pattern in heading or any(pattern in record.command for record in point.records):
                paragraphs.append("\n".join([heading, *(f"  {line}" for line in made_of(point.records))]))
    return "\n\n".join(paragraphs)


def made_of(records: Iterable[Record]) -> list[str]:
    """One block for each command, and the configuration once: the runs of a cell differ in nothing that is computed."""
    records, lines = list(records), []
    for record in records:
        commit = record["git"].get("commit")
        dirty = ", with uncommitted changes" if record["git"].get("dirty") else ""
        made = f"commit {commit[:9]}{dirty}" if commit else "commit not recorded"
        lines.append(f"seed {record['seed']}, {record.status}, {record['device'] or 'device not recorded'}, {made}")
        lines.append(f"  {record.command or 'its command was not recorded'}")
        lines.append(f"  in {record.folder}")
    lines.append("configuration")
    lines += [f"  {line}" for line in configuration(records[0])]
    return lines


def configuration(record: Record) -> list[str]:
    """One line a group: `trainer.  max_steps=400 batch_size=16`."""
    found: dict[str, list[str]] = {}
    for key, value in everything(record).items():
        group, _, name = key.partition(".")
        if key not in _NOT_LISTED:
            found.setdefault(group, []).append(f"{name}={shown(value)}" if name else shown(value))
    return [f"{group}: {' '.join(values)}" for group, values in found.items()]
