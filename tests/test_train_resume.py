"""Runs that are broken off and continue on their curve; checkpoints that cannot be written; what a new start may cost."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from loop_helpers import LLAMA, ROBERTA, VIT, Killed, config_of, kill_when, lines_of, steps_of, train

from velora.errors import ConfigError
from velora.run.order import SeededExamples


class Noisy(SeededExamples):
    """Examples of a task with random noise, as an augmentation would add it."""

    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitems__(self, numbers):
        return [self[number] for number in numbers]

    def __getitem__(self, number):
        image, label = self.examples[number]
        noise = random.randint(0, 9) + int(torch.randint(10, ()))
        return (image.int() + noise).clamp(max=255).to(torch.uint8), label


@pytest.fixture
def noisy(monkeypatch):
    from velora.data import digits

    original = digits.image_task_data

    def with_noise(protocol, splits, transform, about):
        splits = {name: Noisy(split) if name.startswith("train") else split for name, split in splits.items()}
        return original(protocol, splits, transform, about)

    monkeypatch.setattr(digits, "image_task_data", with_noise)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("save_every", [3, 16])
def test_a_run_with_random_examples_continues_on_its_curve(noisy, monkeypatch, tmp_path, num_workers, save_every):
    """In the middle of an epoch and at its end (16 steps); with dropout in the network's drop-path."""
    common = [*VIT, "method=full", "trainer.batch_size=64", "trainer.max_steps=20", f"trainer.save_every={save_every}",
              f"trainer.num_workers={num_workers}", "model.drop_path=0.3"]  # fmt: skip
    whole, broken = (config_of(tmp_path / name, *common) for name in ("whole", "broken"))
    train(whole)
    kill_when(monkeypatch, "training_step", lambda trainer: trainer.state.global_step == 18)
    with pytest.raises(Killed):
        train(broken)
    assert len(steps_of(broken)) == 18
    train(broken)
    assert lines_of(broken) == lines_of(whole)


TWO_PHASES = [*VIT[:-1], "task.protocol=select_then_retrain", "trainer.batch_size=100", "trainer.max_steps=null",
              "trainer.num_epochs=2", "trainer.eval_every=epoch", "trainer.save_every=epoch",
              "trainer.measure_memory=true"]  # fmt: skip


@pytest.mark.parametrize(
    "overrides",
    [
        [*LLAMA, "method=velora", "activations.init=running_average", "trainer.max_steps=20", "trainer.save_every=10",
         "trainer.measure_memory=true"],
        TWO_PHASES,
    ],
    ids=["steps", "two phases"],
)  # fmt: skip
def test_a_run_killed_in_its_last_evaluation_trains_no_further(overrides, monkeypatch, tmp_path):
    whole, broken = (config_of(tmp_path / name, *overrides) for name in ("whole", "broken"))
    expected = train(whole)
    last = max(line["step"] for line in lines_of(whole))
    final_phase = lines_of(whole)[-1]["phase"]
    kill_when(
        monkeypatch, "evaluate",
        lambda t: t.state.global_step == last and (final_phase == "train" or "retrain" in t.args.output_dir),
    )  # fmt: skip
    with pytest.raises(Killed):
        train(broken)
    record = train(broken)
    assert lines_of(broken) == lines_of(whole)
    assert record["metrics"] == expected["metrics"]
    assert record["memory"] == expected["memory"]
    for key, value in expected["speed"].items():
        assert (record["speed"][key] is None) == (value is None), key


def test_a_checkpoint_that_cannot_be_written_is_a_sentence_and_leaves_no_half(monkeypatch, tmp_path):
    from velora.errors import RunError

    def full(self, *args, **kwargs):
        folder = Path(self.args.output_dir) / "checkpoint-4"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "half").write_text("")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.Trainer._save_checkpoint", full)
    config = config_of(tmp_path, *ROBERTA, "trainer.save_every=4")
    with pytest.raises(RunError, match=r"checkpoint-4 cannot be written .*No space left.* runs_dir="):
        train(config)
    assert not list(config.folder.glob("checkpoint-*"))
    assert json.loads((config.folder / "result.json").read_text())["status"] == "failed"


def test_wrong_data_costs_no_earlier_run(tmp_path, monkeypatch):
    """overwrite=true gives up what is there only when the new run can begin."""
    config = config_of(tmp_path, *ROBERTA)
    train(config)
    before = (config.folder / "result.json").read_text()
    again = config_of(tmp_path, *ROBERTA, "overwrite=true", "trainer.max_steps=3")

    def missing(self, preprocessor, config):
        raise ConfigError("data.root=nowhere has no file")

    monkeypatch.setattr(type(again.task), "load", missing)
    with pytest.raises(ConfigError, match="nowhere"):
        train(again)
    assert (config.folder / "result.json").read_text() == before


def test_required_resume_of_a_run_whose_second_phase_has_no_checkpoint_yet(monkeypatch, tmp_path):
    """Killed in the first of two phases: the second one starts from its beginning, as it would have."""
    overrides = [*TWO_PHASES, "trainer.save_every=1"]
    whole, broken = (config_of(tmp_path / name, *overrides) for name in ("whole", "broken"))
    train(whole)
    kill_when(monkeypatch, "training_step", lambda trainer: trainer.state.global_step == 4)
    with pytest.raises(Killed):
        train(broken)
    train(config_of(tmp_path / "broken", *overrides, "resume=required"))
    assert lines_of(broken) == lines_of(whole)
