"""velora-bench step: what is counted against the CPU allocator's own log, the frontier by hand, the record, the picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from make_step_tables import PAGES, updated
from memory_helpers import allocator_bytes

from velora.bench import cli
from velora.bench.step import (
    ACTIVATIONS,
    POINTS,
    REFERENCE,
    Candidate,
    Wishes,
    compare_points,
    frontier,
    table,
)
from velora.memory.meter import random_batch

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
QUICK = Wishes(CPU, repeats=2, overrides=("task.max_length=16", "model.architecture.num_hidden_layers=2"))


@pytest.fixture(scope="module")
def record() -> dict:
    return compare_points("llama_tiny", list(POINTS), QUICK)


def test_the_loss_is_that_of_exact_and_only_gradients_with_velora_differ(record):
    assert list(record["points"]) == list(POINTS)
    for name, point in record["points"].items():
        differ = point["gradients_differ"]
        # the same operations on the same numbers, but for the sums of lean norms and losses: some units of fp32's last place
        tolerance = 0.0 if name in ACTIVATIONS or name.endswith("checkpoint") else 1e-5
        assert abs(point["loss_difference"]) <= tolerance
        assert differ["elsewhere"] <= 10 * tolerance
        assert (differ["with_velora"] > 0.01) == name.startswith("velora")


def test_each_step_along_recompute_keeps_less(record):
    for activations in ACTIVATIONS:
        levels = [
            record["points"][f"{activations}{level}"]["bytes_ratio"] for level in ("", "+lean", "+mlp", "+blocks")
        ]
        assert levels == sorted(set(levels), reverse=True)


@pytest.mark.parametrize("point", ["exact", "velora_all"])
def test_bytes_are_those_of_the_allocator(point, record):
    candidate = Candidate.build([*QUICK.of("llama_tiny"), *POINTS[point]], QUICK)
    assert record["points"][point]["saved_for_backward_bytes"] == allocator_bytes(candidate.forward)


def test_ratios_are_over_exact(record):
    first = record["points"][REFERENCE]
    assert first["time_ratio"] == first["bytes_ratio"] == first["peak_ratio"] == 1.0
    for point in record["points"].values():
        low, high = point["quartiles_seconds"]
        assert low <= point["median_seconds"] <= high
        assert point["time_ratio"] == pytest.approx(point["median_seconds"] / first["median_seconds"])
        assert point["bytes_ratio"] == pytest.approx(
            point["saved_for_backward_bytes"] / first["saved_for_backward_bytes"]
        )
    assert record["points"]["velora_all"]["bytes_ratio"] < record["points"]["velora"]["bytes_ratio"] < 1
    assert {"threads", "load_average", "load_average_after"} <= record["machine"].keys()


def test_with_the_optimiser_its_state_is_in_the_peak(record):
    from dataclasses import replace

    wishes = replace(QUICK, with_optimizer=True)
    candidate = Candidate.build([*wishes.of("llama_tiny"), *POINTS[REFERENCE]], wishes)
    weights = sum(p.numel() * p.element_size() for p in candidate.network.parameters())
    terms = candidate.counted({})["peak_terms_bytes"]
    assert record["points"][REFERENCE]["peak_terms_bytes"]["optimizer"] == 0
    assert 2 * weights <= terms["optimizer"] <= 2.01 * weights  # AdamW's two moments, and a step counter each


@pytest.mark.parametrize(
    ("points", "best"),
    [
        ({"a": (1.0, 1.0)}, ["a"]),
        ({"a": (1.0, 1.0), "b": (0.9, 1.0), "c": (1.0, 0.5), "d": (1.1, 0.5)}, ["b", "c"]),
        ({"a": (2.0, 1.0), "b": (1.0, 2.0), "c": (1.5, 1.5), "d": (1.6, 1.6)}, ["b", "c", "a"]),
        ({"a": (1.0, 1.0), "b": (1.0, 1.0)}, ["a", "b"]),
    ],
)
def test_the_frontier_is_what_nothing_beats(points, best):
    assert frontier(points) == best


@pytest.mark.parametrize(
    ("model", "overrides", "shapes"),
    [
        ("llama_60m", ["model.architecture.num_hidden_layers=1"], {"input_ids": (8, 256), "labels": (8, 256)}),
        ("roberta_base", ["model.architecture.num_hidden_layers=1"], {"input_ids": (16, 64), "labels": (16,)}),
        ("vit_b16", ["++model.overrides.depth=1"], {"pixel_values": (4, 3, 224, 224), "labels": (4,)}),
    ],
)
def test_batches_are_random_and_of_the_tasks_shapes(model, overrides, shapes):
    from velora.config.compose import compose
    from velora.memory.meter import network_without_weights

    config = compose(*Wishes(CPU).of(model), *overrides)
    with torch.device("meta"):
        network = network_without_weights(config)
    batch = random_batch(
        config, torch.nn.ModuleList([torch.nn.Linear(1, 1)]) if model == "vit_b16" else _on_cpu(network)
    )
    for name, shape in shapes.items():
        assert tuple(batch[name].shape) == shape
        assert batch[name].unique().numel() > 1
    if model == "llama_60m":
        assert torch.equal(batch["labels"], batch["input_ids"])
        assert 20_000 < batch["input_ids"].max() < 32_000
    again = random_batch(
        config, torch.nn.ModuleList([torch.nn.Linear(1, 1)]) if model == "vit_b16" else _on_cpu(network)
    )
    assert all(torch.equal(again[name], tensor) for name, tensor in batch.items())


def _on_cpu(network):
    class Stand(torch.nn.Linear):
        def get_input_embeddings(self):
            return network.get_input_embeddings()

    return Stand(1, 1)


def test_what_a_model_does_not_offer_is_left_out_with_its_sentence(monkeypatch):
    monkeypatch.setitem(POINTS, "odd", ("activations=velora", "activations.layers=[nothing_of_that_name]"))
    found = compare_points("llama_tiny", ["odd"], QUICK)
    assert list(found["points"]) == [REFERENCE]
    assert "nothing_of_that_name" in found["left_out"]["odd"]
    assert "left out: odd: " in table(found)


def test_files_and_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["velora-bench", "step", "..."])
    arguments = ["--model", "llama_tiny", "--points", "velora_all", "--repeats", "1", "task.max_length=8"]
    files = ["--json", f"{tmp_path}/new/{{model}}.json", "--picture", f"{tmp_path}/new/{{model}}.png"]
    assert cli.main(["step", *arguments, *files]) == 0
    found = json.loads((tmp_path / "new" / "llama_tiny.json").read_text())
    assert list(found["points"]) == ["exact", "velora_all"]
    assert "task.max_length=8" in found["overrides"]
    assert found["batch"]["input_ids"] == [4, 8]
    assert {"versions", "git", "command"} <= found.keys()
    assert (tmp_path / "new" / "llama_tiny.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed if line.startswith(("exact", "velora_all"))] == ["exact", "velora_all"]


def test_every_point_composes():
    from velora.config.compose import compose

    for overrides in POINTS.values():
        config = compose(*Wishes(CPU).of("llama_60m"), *overrides)
        wanted = {override.partition("=")[2] for override in overrides if override.startswith("recompute=")}
        assert config.raw["recompute"]["kind"] in (wanted or {"none"})


def test_the_tables_of_the_pages_are_those_of_the_records():
    for page in PAGES:
        assert updated(page) == (ROOT / page).read_text(), "run python docs/make_step_tables.py"


def test_the_table_of_a_page_says_what_the_record_says(record, tmp_path):
    (tmp_path / "step_llama_tiny.json").write_text(json.dumps(record))
    text = "before\n<!-- step: llama_tiny -->\nold\n<!-- end -->\nafter\n<!-- step: gpt -->\nkept\n<!-- end -->\n"
    page = updated("README.md", text, tmp_path)
    point = record["points"]["velora_all"]
    assert page.startswith("before\n<!-- step: llama_tiny -->\n")
    assert page.endswith("<!-- end -->\nafter\n<!-- step: gpt -->\nkept\n<!-- end -->\n")
    assert "old" not in page
    row = next(line for line in page.splitlines() if line.startswith("| velora_all"))
    cells = [cell.strip(" *") for cell in row.strip("|").split("|")]
    assert cells[1:3] == [f"{point['time_ratio']:.2f}", f"{point['bytes_ratio']:.2f}"]
