"""Runs at level `memory`: no data, no weights, estimates in the record; and timed steps, which run where there is a device."""

from __future__ import annotations

import json

import pytest
import torch

import velora
from velora.memory.estimate import estimate
from velora.run.shapes import ESTIMATED, timed_steps

TINY = (
    "model.architecture.hidden_size=128", "model.architecture.intermediate_size=352", "model.architecture.vocab_size=256",
    "model.architecture.num_attention_heads=4", "model.architecture.num_key_value_heads=4",
    "model.architecture.num_hidden_layers=1", "task.max_length=16", "activations.num_groups=8", "wandb.mode=disabled",
)  # fmt: skip


@pytest.fixture
def config(tmp_path):
    def of(*overrides: str) -> velora.config.run.Config:
        return velora.compose("experiment=table7_c4/velora", *TINY, f"runs_dir={tmp_path}", *overrides)

    return of


def test_a_record_of_shapes(config, tmp_path):
    """There is no C4 below tmp_path and no hub: nothing is read. The estimate is that of velora-memory for CUDA."""
    asked = config("level=memory")
    record = velora.train(asked)
    expected = estimate(asked, device="cuda").to_json()
    memory = record["memory"]
    assert memory["peak_estimated_bytes"] == expected["peak_bytes"]
    assert memory["saved_for_backward_bytes"] == expected["saved_for_backward_bytes"]
    assert memory["accounting_bytes"] > memory["input_activations_bytes"] > 0
    assert record["parameters"]["trainable"] == record["parameters"]["total"] > 0
    assert record["metrics"] == {"best": {}}
    if not torch.cuda.is_available():
        assert record["device"] == ESTIMATED
        assert memory["peak_allocated_bytes"] is None
        assert set(record["speed"].values()) == {None}
    folder = tmp_path / "memory/table7_c4"
    (written,) = folder.rglob("result.json")
    assert json.loads(written.read_text())["config"]["experiment"]["level"] == "memory"


def test_its_inputs_are_counted_as_the_paper_counts_them(config):
    """One block, 128 wide, 352 in the MLP: query, key and output whole, value and down as 8 numbers, 16 tokens of 4 bytes."""
    record = velora.train(config("level=memory"))
    assert record["memory"]["input_activations_bytes"] == 16 * 4 * (3 * 128 + 8 + 8)


def test_the_same_command_finds_it_finished(config, capsys):
    velora.train(config("level=memory"))
    capsys.readouterr()
    velora.train(config("level=memory"))
    assert "holds this run already, finished" in capsys.readouterr().out


def test_timed_steps_are_whole_training_steps(config):
    found = timed_steps(config("trainer.device=cpu"), torch.device("cpu"), num_steps=2)
    assert found.num_steps == 2
    assert found.steps_per_second > 0
    assert (found.peak_allocated_bytes, found.peak_reserved_bytes) == (None, None)


@pytest.mark.gpu
def test_on_a_gpu_peaks_and_speed_are_measured(config):
    record = velora.train(config("level=memory"))
    assert record["device"] == torch.cuda.get_device_name()
    assert record["memory"]["peak_allocated_bytes"] > record["memory"]["weights_bytes"]
    assert record["speed"]["steps_per_second"] > 0
