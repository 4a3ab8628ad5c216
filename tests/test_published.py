"""The composed experiments against a table of published facts that was made apart from them (tests/published.yaml)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from composition import EXPERIMENTS
from text_helpers import composed
from torch import nn

ENTRIES = yaml.safe_load((Path(__file__).parent / "published.yaml").read_text())
WITHOUT_FACTS = {"table2/velora_full", "table4/flora_rank"}  # not printed; not known whether printed
WITHOUT_FACTS |= {
    f"table7_{t}/{row}" for t in ("c4", "alpaca") for row in ("lean", "velora_all_lean", "velora_all_blocks")
}


def look_up(raw: Any, key: str) -> Any:
    """The value under a dotted key, or a text that says where the way ends."""
    for part in key.split("."):
        if not isinstance(raw, dict) or part not in raw:
            return f"no {part} in {key}"
        raw = raw[part]
    return raw


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: " ".join(entry["overrides"]))
def test_composed_as_published(entry):
    raw = composed(*entry["overrides"]).raw
    found = {key: look_up(raw, key) for key in entry["facts"]}
    assert found == entry["facts"], entry["source"]


def test_every_published_row_has_facts():
    with_facts = {entry["overrides"][0].partition("=")[2] for entry in ENTRIES}
    rows = {name for name in EXPERIMENTS if name.startswith(("table", "vtab_", "galore", "qlora"))}
    assert rows - with_facts == WITHOUT_FACTS


def test_table4_flora_is_what_the_authors_call_does():
    """`flora_opt.Flora(parameters, lr, weight_decay)`, as in the VeLoRA authors' pretrain_llama.py, step for step."""
    flora_opt = pytest.importorskip("flora_opt")
    config = composed("experiment=table4/flora")
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4))
    theirs = copy.deepcopy(ours)
    optimizers = [
        config.optimizer.build(ours, config),
        flora_opt.Flora(theirs.parameters(), lr=config.trainer.learning_rate, weight_decay=0.0),
    ]
    for _ in range(4):
        gradients = [torch.randn_like(p) for p in ours.parameters()]
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-6, atol=1e-7)  # float32, four steps
