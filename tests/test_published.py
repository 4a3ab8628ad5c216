"""The composed experiments against a table of published facts that was made apart from them (tests/published.yaml)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from composition import EXPERIMENTS, composed

ENTRIES = yaml.safe_load((Path(__file__).parent / "published.yaml").read_text())
WITHOUT_FACTS = {"table2/velora_full", "table4/flora_rank"}  # not printed; not known whether printed


def look_up(raw: Any, key: str) -> Any:
    """The value under a dotted key, or a text that says where the way ends."""
    for part in key.split("."):
        if not isinstance(raw, dict) or part not in raw:
            return f"no {part} in {key}"
        raw = raw[part]
    return raw


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: " ".join(entry["overrides"]))
def test_composed_as_published(entry):
    raw = composed(*entry["overrides"])
    found = {key: look_up(raw, key) for key in entry["facts"]}
    assert found == entry["facts"], entry["source"]


def test_every_published_row_has_facts():
    with_facts = {entry["overrides"][0].partition("=")[2] for entry in ENTRIES}
    rows = {name for name in EXPERIMENTS if name.startswith(("table", "memory/", "vtab_", "galore"))}
    assert rows - with_facts == WITHOUT_FACTS
