"""Tables on the terminal and stacked bars, for ledgers and for peaks alike: columns are methods, parts are their terms.

MiB are 2^20 bytes; GB and MB are powers of ten, as the paper's tables are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from velora.memory.freed import Freed
from velora.memory.ledger import Grouping, Ledger
from velora.memory.timeline import TERMS, MemoryFigures

Columns = Mapping[str, Mapping[str, int]]
"""Method -> part (a term, a role, ...) -> bytes."""


def mebibytes(num_bytes: int) -> str:
    """One number in MiB for a column of a table: "1,234.5"."""
    return f"{num_bytes / 2**20:,.1f}"


def ledger_table(ledger: Ledger, by: Grouping, title: str = "") -> Any:
    """A rich Table: one row per group with its bytes, its share and the number of storages; the last row is the total."""
    table = _table(title, ["held by" if by == "holders" else by, "MiB", "share", "storages"])
    counts: dict[str, int] = {}
    for entry in ledger.entries:
        counts[entry.group(by)] = counts.get(entry.group(by), 0) + 1
    for group, num_bytes in ledger.grouped(by).items():
        share = f"{num_bytes / ledger.total_bytes:.1%}"
        table.add_row(group, mebibytes(num_bytes), share, str(counts[group]))
    table.add_section()
    table.add_row("saved for backward", mebibytes(ledger.total_bytes), "", str(len(ledger.entries)))
    if ledger.outside_hook_bytes:
        num_outside = sum(entry.outside_hook for entry in ledger.entries)
        row = "  of it kept outside the saved-tensors hook"
        table.add_row(row, mebibytes(ledger.outside_hook_bytes), "", str(num_outside))
    apart = {item.what: 0 for item in ledger.lived_before}
    for item in ledger.lived_before:
        apart[item.what] += item.num_bytes
    for what, num_bytes in apart.items():
        table.add_row(f"not counted: {what}s that backward reads", mebibytes(num_bytes), "", "")
    return table


def freed_table(choices: Sequence[Freed], title: str = "") -> Any:
    """A rich Table of what each choice of layers would free, what it would keep instead, and who holds the rest."""
    table = _table(
        title, ["VeLoRA on", "inputs MiB", "freed MiB", "codes MiB", "saved MiB", "the rest is also held by"]
    )
    for choice in choices:
        figures = (choice.held_bytes, choice.freed_bytes, choice.codes_bytes, choice.saved_bytes)
        rest = ", ".join((*choice.can_join, *choice.never_let_go))
        table.add_row(choice.choice, *map(mebibytes, figures), rest)
    return table


def figures_table(figures: MemoryFigures, measured: MemoryFigures | None, title: str) -> Any:
    """A rich Table of one configuration: each term at the peak and at its own largest, then the peak of each phase."""
    heads = ["", "at the peak MiB", "most MiB"]
    sources = [figures] if measured is None else [figures, measured]
    table = _table(title, ["", *(f"{head} ({s.source})" for s in sources for head in heads[1:])])
    for term in TERMS:
        row = [mebibytes(value) for s in sources for value in (s.peak.terms[term], s.term_peaks[term])]
        table.add_row(term, *row)
    table.add_section()
    table.add_row("peak", *[cell for s in sources for cell in (mebibytes(s.peak.num_bytes), "")])
    for phase in figures.by_phase:
        row = [mebibytes(_phase_peak(s, phase)) for s in sources]
        table.add_row(f"  in {phase}", *[cell for figure in row for cell in (figure, "")])
    table.add_row("saved for backward", *[cell for s in sources for cell in ("", mebibytes(s.saved_bytes))])
    return table


def _phase_peak(figures: MemoryFigures, phase: str) -> int:
    peak = figures.by_phase[phase]
    return peak.num_bytes if peak is not None else 0


def columns_table(columns: Columns, title: str, extra: Mapping[str, Mapping[str, str]] | None = None) -> Any:
    """A rich Table with one row per method, one column per part (MiB) and their sum; `extra` adds columns of text."""
    parts = _parts(columns)
    extra = extra or {}
    table = _table(title, ["method", *parts, "sum MiB", *extra])
    for method, sizes in columns.items():
        cells = [mebibytes(sizes.get(part, 0)) for part in parts]
        more = [texts.get(method, "") for texts in extra.values()]
        table.add_row(method, *cells, mebibytes(sum(sizes.values())), *more)
    return table


def draw_columns(columns: Columns, path: Path, title: str) -> None:
    """One stacked bar per method, parts in the order of their first appearance, into a file (PNG, SVG, PDF)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = _parts(columns)
    unit, divisor = ("GiB", 2**30) if max(sum(s.values()) for s in columns.values()) >= 2**31 else ("MiB", 2**20)
    figure, axes = pyplot.subplots(figsize=(max(5.0, 2.5 + 0.9 * len(columns)), 5), layout="constrained")
    colors = pyplot.get_cmap("tab20").colors  # type: ignore[attr-defined]
    base = dict.fromkeys(columns, 0.0)
    for index, part in enumerate(parts):
        heights = [columns[method].get(part, 0) / divisor for method in columns]
        color = colors[2 * index % 20 + (index // 10) % 2]
        axes.bar(list(columns), heights, bottom=list(base.values()), label=part, color=color, width=0.7)
        base = {method: base[method] + height for method, height in zip(columns, heights, strict=True)}
    for position, total in enumerate(base.values()):
        axes.annotate(f"{total:,.4g}", (position, total), ha="center", va="bottom", fontsize=9)
    axes.set_ylim(0, 1.06 * max(base.values()))
    axes.set_ylabel(unit)
    axes.set_title(title)
    axes.tick_params(axis="x", rotation=30 if max(map(len, columns)) > 8 else 0)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _parts(columns: Columns) -> list[str]:
    return list(dict.fromkeys(part for sizes in columns.values() for part in sizes))


def _table(title: str, heads: Sequence[str]) -> Any:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", show_edge=False)
    for index, head in enumerate(heads):
        text = index == 0 or head.startswith("the rest")
        table.add_column(escape(head), justify="left" if text else "right", overflow="fold")
    return table
