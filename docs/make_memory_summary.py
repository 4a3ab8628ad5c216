"""The records of velora-memory as one page: `python docs/make_memory_summary.py runs/memory` writes README.md there.

One table per folder, one row per record, beside what the paper prints.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TERMS = ("weights", "gradients", "optimizer", "activations", "transient")
NOTE = """# Memory, without the device

Written by `python docs/make_memory_summary.py runs/memory` from the records beside it. Each record names the command that
made it, the versions and the commit; nothing here was run on a GPU. The peak is that of two training steps for a CUDA device,
estimated with fake tensors; in it is what tensors take, not the CUDA context, the libraries' workspaces or fragmentation.
GB are 10^9 bytes. How the paper's figures came about, and which of them can be reproduced, is in `docs/memory.md`.
"""


def main(argv: Sequence[str]) -> None:
    folder = Path(argv[0])
    parts = [NOTE, *(_table(child) for child in sorted(folder.iterdir()) if child.is_dir())]
    (folder / "README.md").write_text("\n".join(parts))
    print(folder / "README.md")


def _table(folder: Path) -> str:
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    order = {
        word: index for index, word in enumerate(records[0]["command"].replace(",", " ").replace("=", " ").split())
    }
    several_models = len({record["model"] for record in records}) > 1
    records.sort(key=lambda record: [order.get(word, len(order)) for word in (_experiment(record), record["model"])])
    heads = [
        "",
        "batch",
        "precision",
        "peak GB",
        *(f"{term} GB" for term in TERMS),
        "saved for backward GB",
        "paper GB",
    ]
    rows = [heads, ["---"] + ["---:"] * (len(heads) - 1), *(_row(record, several_models) for record in records)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    charts = [f"![{path.stem}]({folder.name}/{path.name})" for path in sorted(folder.glob("*.png"))]
    command = records[0]["command"]
    return "\n".join([f"## {folder.name}", "", f"    {command}", "", *lines, "", *charts, ""])


def _experiment(record: dict[str, Any]) -> str:
    experiment = record["config"].get("experiment")
    return experiment["name"] if experiment else record["method"]


def _row(record: dict[str, Any], with_model: bool) -> list[str]:
    estimate, trainer = record["estimate"], record["config"]["trainer"]
    terms = dict(estimate["peak_terms_bytes"])
    terms["transient"] += terms.pop("batch")
    figures = [estimate["peak_bytes"], *(terms[term] for term in TERMS), estimate["saved_for_backward_bytes"]]
    printed = record["paper"].get("memory_gb")
    label = _experiment(record) if record["config"].get("experiment") else record["name"]
    label += f" {record['model']}" if with_model else ""
    precision = f"{trainer['precision']}, weights {record['config']['weights'].get('dtype')}"
    quantised = record["config"]["weights"].get("quant_type")
    precision += f" and {quantised}" if quantised else ""
    cells = [f"{figure / 1e9:.2f}" for figure in figures]
    return [label, str(record["batch_size"]), precision, *cells, "" if printed is None else f"{printed}"]


if __name__ == "__main__":
    main(sys.argv[1:])
