"""What the settings of the loop do to the curve, and what its figures count: each of these was a mutation that no test saw."""

from __future__ import annotations

import itertools
import time

import pytest
import transformers
from loop_helpers import LLAMA, ROBERTA, VIT, config_of, lines_of, steps_of, train, write_texts

from velora.run.order import StepBatches


def curve(config):
    train(config)
    return [(line["loss"], line["grad_norm"]) for line in steps_of(config)]


def test_null_clips_nothing(tmp_path):
    """The norms are above 1 here, so clipping at 1 would show; a limit that is never reached would not."""
    found = {
        limit: curve(config_of(tmp_path / limit, *LLAMA, "method=full", f"trainer.max_grad_norm={limit}"))
        for limit in ("null", "1e9", "1.0")
    }
    assert max(norm for _, norm in found["null"]) > 1.05
    assert found["null"] == found["1e9"]
    assert found["null"] != found["1.0"]


def test_bf16_computes_in_bf16(tmp_path):
    """The linear layers' inputs are kept in two bytes, and the curve is another one, close by (8 bits of mantissa)."""
    found, saved = {}, {}
    for precision in ("fp32", "bf16"):
        config = config_of(
            tmp_path / precision, *LLAMA, "method=full", f"trainer.precision={precision}", "trainer.measure_memory=true"
        )
        record = train(config)
        saved[precision] = record["memory"]["saved_for_backward_bytes"]
        found[precision] = [line["loss"] for line in steps_of(config)]
    assert found["bf16"] != found["fp32"]
    assert found["bf16"] == pytest.approx(found["fp32"], rel=2e-2)
    assert saved["bf16"] < 0.9 * saved["fp32"]


def test_the_second_phase_stops_at_the_epoch_that_the_first_selected(tmp_path, monkeypatch):
    """Scores by hand: the second of three epochs is the best on the validation images."""
    config = config_of(
        tmp_path, *VIT[:-1], "method=linear_probe", "task.protocol=select_then_retrain", "trainer.batch_size=100",
        "trainer.max_steps=null", "trainer.num_epochs=3", "trainer.eval_every=epoch",
    )  # fmt: skip
    scores = iter([0.1, 0.9, 0.2, 0.5])
    monkeypatch.setattr("velora.data.images.top1", lambda predictions, labels: {"loss": 1.0, "accuracy": next(scores)})
    record = train(config)
    lines = lines_of(config)
    assert {p: max(x["step"] for x in lines if x["phase"] == p) for p in ("select", "retrain")} == {
        "select": 3 * 8,  # 800 images
        "retrain": 2 * 10,  # 1000 images, two epochs
    }
    assert record["metrics"]["accuracy"] == 0.5
    assert record["metrics"]["select"]["best"]["epoch"] == 2


def test_speed_counts_tokens_without_padding_once(tmp_path):
    """Ten steps, of which the first three are warm-up: the tokens of the other seven, from the sequences themselves."""
    config = config_of(
        tmp_path, *LLAMA[1:], "task=c4", "task.folder=short", f"data.root={write_texts(tmp_path)}", "method=linear_probe",
        "trainer.max_steps=10", "trainer.micro_batch_size=4",
    )  # fmt: skip
    speed = train(config)["speed"]
    stream = config.task.load(config.model.preprocessor(config), config).phases[0].train
    lengths = [len(ids) for ids in itertools.islice(iter(stream), 80)]
    assert max(lengths) > 1.5 * min(lengths)  # so there is padding
    assert speed["tokens_per_second"] / speed["steps_per_second"] == pytest.approx(sum(lengths[24:]) / 7)


def test_speed_counts_images(tmp_path):
    config = config_of(tmp_path, *VIT, "method=linear_probe", "trainer.max_steps=10")
    speed = train(config)["speed"]
    assert speed["images_per_second"] / speed["steps_per_second"] == pytest.approx(8)
    assert StepBatches(1000, 8, 8, drop_last=False, seed=0, rank=0, num_processes=1).steps_per_epoch == 125


def test_neither_evaluations_nor_checkpoints_are_training_time(tmp_path, monkeypatch):
    """Each takes half a second here, and the four steps a few hundredths."""
    for name in ("evaluate", "_save_checkpoint"):
        original = getattr(transformers.Trainer, name)

        def slow(self, *args, original=original, **kwargs):
            time.sleep(0.5)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(transformers.Trainer, name, slow)
    config = config_of(tmp_path, *ROBERTA, "method=linear_probe", "trainer.eval_every=1", "trainer.save_every=2")
    assert train(config)["speed"]["train_seconds"] < 0.5
