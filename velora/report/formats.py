"""Tables as Markdown, LaTeX (booktabs) and CSV. Strings from records are escaped in each of them.

A cell of a CSV that a spreadsheet would take for a formula (it begins with =, +, - or @) has an apostrophe before it, unless
it is a plain number. Where LaTeX's usual encodings lack a character it is spelled out (U+1F600), so that every engine sets
the page.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Sequence

from velora.report.table import Cell, Table
from velora.report.text import for_markdown, for_terminal

Escape = Callable[[str], str]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], escape: Escape = for_markdown) -> str:
    """A Markdown table with aligned columns, readable as plain text too; every cell is escaped."""
    head, *rows = [[escape(cell) for cell in row] for row in [head, *rows]]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [head, *rows]
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def markdown_tables(tables: Iterable[Table], escape: Escape = for_markdown) -> str:
    """Headings, tables, and below each the meaning of its marks."""
    parts = []
    for table in tables:
        lines = [f"## {escape(table.title)}\n"]
        lines += [f"{escape(sentence)}\n" for sentence in table.about]
        lines.append(markdown(table.head, [[marked(cell) for cell in row] for row in table.rows], escape))
        lines += [escape(f"({letter}) {sentence}") + "  " for letter, sentence in table.notes]
        lines += [escape(sentence) + "  " for sentence in table.remarks]
        if lines[-1].endswith("  "):
            lines[-1] = lines[-1].rstrip() + "\n"
        parts.append("\n".join(lines))
    return "\n".join(parts)


def marked(cell: Cell) -> str:
    """The text of a cell with its marks: "0.83 (a)"."""
    return cell.text + (f" ({','.join(cell.marks)})" if cell.marks else "")


def latex_tables(tables: Iterable[Table]) -> str:
    """One float a table, for a document with the packages that the first line names."""
    return "% \\usepackage[T1]{fontenc} \\usepackage{booktabs,graphicx}\n\n" + "\n".join(
        _latex(table) for table in tables
    )


def _latex(table: Table) -> str:
    lines = [r"\begin{table}", r"\centering\small", rf"\caption{{{for_latex(table.title)}}}"]
    lines += [rf"{for_latex(sentence)}\par" for sentence in table.about]
    lines.append(r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%")
    lines += [rf"\begin{{tabular}}{{{'l' * len(table.head)}}}", r"\toprule"]
    lines += [" & ".join(for_latex(name) for name in table.head) + r" \\", r"\midrule"]
    for place, row in enumerate(table.rows):
        if place in table.rules:
            lines.append(r"\midrule")
        lines.append(" & ".join(_latex_cell(cell) for cell in row) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}}"]
    below = [rf"$^{{{letter}}}$ {for_latex(sentence)}\par" for letter, sentence in table.notes]
    below += [rf"{for_latex(sentence)}\par" for sentence in table.remarks]
    if below:
        lines += [r"\begin{flushleft}\footnotesize", *below, r"\end{flushleft}"]
    return "\n".join([*lines, r"\end{table}", ""])


def _latex_cell(cell: Cell) -> str:
    marks = rf"$^{{{','.join(cell.marks)}}}$" if cell.marks else ""
    text = for_latex(cell.text)
    return (f"{{{text}}}" if text.startswith("[") else text) + marks  # \\[ would be a length


_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    "±": r"$\pm$", "-": "{-}", "`": r"\textasciigrave{}", "'": r"\textquotesingle{}", '"': r"\textquotedbl{}", "…": r"\ldots{}",
}  # fmt: skip


def for_latex(text: str) -> str:
    """Text that LaTeX prints as it stands: nothing in it is a command, and no two hyphens become a dash."""
    return "".join(
        _LATEX.get(c) or (c if c.isascii() or c in "äöüÄÖÜßéèêàçñ" else f"U+{ord(c):04X}") for c in for_terminal(text)
    )


def csv_text(rows: Iterable[Sequence[str | int | float | None]]) -> str:
    """Comma-separated values with a head; numbers in full precision, nothing that a spreadsheet would execute."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([[_for_csv(value) for value in row] for row in rows])
    return out.getvalue()


def _for_csv(value: str | int | float | None) -> str:
    if value is None:
        return ""
    if isinstance(value, int | float):
        return repr(value)
    text = for_terminal(value)
    is_number = re.fullmatch(r"[+-]?\d+(\.\d*)?(e[+-]?\d+)?", text)
    return f"'{text}" if re.match(r"\s*[=+\-@]", text) and len(text) > 1 and not is_number else text


def csv_of(table: Table) -> str:
    return csv_text([table.head, *([marked(cell) for cell in row] for row in table.rows)])
