"""The training loop on tiny networks of every family: schedules, scores, devices, trackers, and what it refuses.

The loss of a step: test_train_loss.py. Continuing: test_train_resume.py. Time and peaks: test_train_figures.py.
"""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from loop_helpers import LLAMA, PHASE, ROBERTA, VIT, config_of, steps_of, train

from velora.config.parts import Phase
from velora.errors import ConfigError
from velora.run import train as loop
from velora.run.arguments import training_arguments, use_one_device


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["trainer.schedule=constant"], [1.0] * 8),
        (["trainer.schedule=constant", "trainer.warmup_steps=4"], [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]),
        (["trainer.schedule=linear"], [1 - k / 8 for k in range(8)]),
        (["trainer.schedule=linear", "trainer.warmup_steps=2"], [0, 0.5, *(1 - k / 6 for k in range(6))]),
        (["trainer.schedule=linear", "trainer.warmup_ratio=0.25"], [0, 0.5, *(1 - k / 6 for k in range(6))]),
        (["trainer.schedule=cosine"], [(1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)]),
        (
            ["trainer.schedule=cosine", "trainer.min_lr_ratio=0.1", "trainer.warmup_steps=2"],
            [0, 0.5, *(0.1 + 0.9 * (1 + math.cos(math.pi * k / 6)) / 2 for k in range(6))],
        ),
    ],
    ids=["constant", "constant warm-up", "linear", "linear warm-up", "linear ratio", "cosine", "cosine to a tenth"],
)
def test_learning_rates_of_each_schedule(settings, expected, tmp_path):
    config = config_of(tmp_path, *ROBERTA, "method=linear_probe", "trainer.max_steps=8", *settings)
    train(config)
    assert [line["learning_rate"] / 1e-3 for line in steps_of(config)] == pytest.approx(expected)


def test_a_warm_up_longer_than_the_run_is_said(tmp_path, capsys):
    train(config_of(tmp_path, *ROBERTA, "method=linear_probe", "trainer.warmup_steps=40"))
    assert "the warm-up (40 steps) is not shorter than the run (4 steps):" in capsys.readouterr().out


def test_an_interval_that_a_protocol_does_not_use_is_said(tmp_path, capsys):
    common = [*VIT, "method=linear_probe", "trainer.max_steps=1"]
    for interval, said in (("2", True), ("end", False)):
        train(config_of(tmp_path / interval, *common, f"trainer.eval_every={interval}"))
        assert (f"trainer.eval_every={interval} is not used with this protocol" in capsys.readouterr().out) == said


def test_drop_last(tmp_path):
    """1000 images in batches of 64: 15 steps an epoch with it, 16 without."""
    counts = []
    for drop_last in ("true", "false"):
        config = config_of(
            tmp_path / drop_last, *VIT, "method=linear_probe", "trainer.batch_size=64", "trainer.max_steps=null",
            "trainer.num_epochs=1", f"trainer.drop_last={drop_last}",
        )  # fmt: skip
        train(config)
        counts.append(len(steps_of(config)))
    assert counts == [15, 16]


def state(*scores, key="accuracy"):
    return SimpleNamespace(
        log_history=[{"step": 10 * (i + 1), "epoch": i + 1.0, f"eval_{key}": score} for i, score in enumerate(scores)]
    )


UP = SimpleNamespace(best_metric="accuracy", greater_is_better=True)
DOWN = SimpleNamespace(best_metric="accuracy", greater_is_better=False)


@pytest.mark.parametrize(
    ("scores", "data", "step"),
    [
        ([0.1, 0.3, 0.2], UP, 20),
        ([0.3, 0.1, 0.1], DOWN, 20),
        ([0.2, 0.3, 0.3], UP, 20),
        ([math.nan, 0.1, 0.2], UP, 30),
        ([math.nan, 0.2, 0.1], DOWN, 30),
        ([0.1, math.nan], UP, 10),
        ([math.nan, math.nan], UP, 20),
    ],
)
def test_best_evaluation(scores, data, step):
    final, best = loop.choose_scores(state(*scores), data, PHASE)
    assert best["step"] == step
    assert best["epoch"] == step / 10
    assert final["accuracy"] == scores[-1] or math.isnan(scores[-1])


def test_the_first_validation_split_selects():
    history = SimpleNamespace(
        log_history=[{"step": s, "epoch": s, "eval_a_accuracy": a, "eval_b_accuracy": b} for s, a, b in [(1, 2, 1), (2, 1, 2)]]
    )  # fmt: skip
    assert loop.choose_scores(history, UP, Phase("train", None, {"a": None, "b": None}))[1]["step"] == 1


def test_fp16_without_cuda_is_refused(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(ConfigError, match=r"trainer.precision=fp16 .*needs a CUDA device.*bf16 or fp32"):
        train(config_of(tmp_path, *ROBERTA, "trainer.precision=fp16"))


def test_one_process_takes_one_device(capsys):
    arguments = SimpleNamespace(n_gpu=4, _n_gpu=4)
    use_one_device(arguments)
    assert arguments._n_gpu == 1
    assert "4 GPUs are visible and one is used; torchrun --nproc_per_node 4" in capsys.readouterr().out


def test_memory_is_not_pinned_for_a_run_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    arguments = training_arguments(config_of(tmp_path, *ROBERTA, "trainer.device=cpu"), tmp_path, "end")
    assert arguments.dataloader_pin_memory is False


def test_out_of_memory_on_a_cpu_is_called_so(monkeypatch, tmp_path):
    from velora.errors import RunError

    def too_much(self, *args, **kwargs):
        torch.empty(2**60)

    monkeypatch.setattr(loop.PhaseTrainer, "training_step", too_much)
    config = config_of(tmp_path, *ROBERTA)
    with pytest.raises(RunError, match=r"out of memory: .*lower trainer.micro_batch_size"):
        train(config)
    assert json.loads((config.folder / "result.json").read_text())["status"] == "out_of_memory"


def test_each_run_of_a_process_has_a_wandb_run_of_its_own(tmp_path, monkeypatch):
    """Offline; a stand-in for wandb notes what it is told, since the real one starts a service."""
    opened, logged, finished = [], [], []

    class Stub:
        def __init__(self, **options):
            opened.append(options)
            self.name = options["name"]

        def log(self, values):
            logged.append((self.name, values))

        def finish(self, exit_code):
            finished.append((self.name, exit_code))

    import wandb

    monkeypatch.setattr(wandb, "init", lambda **options: Stub(**options))
    for seed in (0, 1):
        train(config_of(tmp_path, *ROBERTA, "wandb.mode=offline", "wandb.tags=[a,b]", f"seed={seed}"))
    assert [options["name"] for options in opened] == ["test/seed0", "test/seed1"]
    assert {options["dir"] for options in opened} == {str(tmp_path / "test" / f"seed{seed}") for seed in (0, 1)}
    assert all(options["mode"] == "offline" and options["tags"] == ["a", "b"] for options in opened)
    assert finished == [("test/seed0", 0), ("test/seed1", 0)]
    assert [name for name, _ in logged] == ["test/seed0"] * 5 + ["test/seed1"] * 5


def test_wandb_that_fails_costs_no_training(tmp_path, monkeypatch, capsys):
    import wandb

    def broken(**options):
        raise RuntimeError("no answer from the server")

    monkeypatch.setattr(wandb, "init", broken)
    record = train(config_of(tmp_path, *ROBERTA, "wandb.mode=online"))
    assert record["status"] == "ok"
    assert "the run goes on without it" in capsys.readouterr().out


def test_architecture_that_does_not_fit(tmp_path):
    with pytest.raises(ConfigError, match=r"model.architecture.*attention heads \(6\)"):
        train(
            config_of(
                tmp_path,
                *[o for o in LLAMA if "num_attention_heads" not in o],
                "model.architecture.num_attention_heads=6",
            )
        )
