"""Runs that diverge, and steps that a gradient scaler skips, which are no divergence."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from loop_helpers import LLAMA, PHASE, ROBERTA, config_of, steps_of, train

from velora.errors import Diverged
from velora.run import train as loop
from velora.run.figures import Figures


class Stepping:
    """An optimiser as accelerate wraps it."""

    def __init__(self, skipped, state):
        self.step_was_skipped, self.state = skipped, state


def watch(tmp_path):
    config = config_of(tmp_path, *ROBERTA)
    logged = []
    run = SimpleNamespace(log=logged.append, writes=True)
    trainer = SimpleNamespace(order=None, data=None, figures=Figures(torch.device("cpu"), "tokens"))
    watch = loop.Watch(config, run, PHASE, trainer, SimpleNamespace(signal_name=None), None)
    return watch, trainer.figures, logged


def test_a_step_that_the_gradient_scaler_skips_is_no_divergence(tmp_path):
    watching, figures, logged = watch(tmp_path)
    progress = SimpleNamespace(global_step=1, epoch=0.1)
    figures.memory["gradients_bytes"] = 0
    logs = {"loss": 0.5, "grad_norm": math.inf, "learning_rate": 1e-3}
    watching.on_optimizer_step(None, progress, None, optimizer=Stepping(True, {}))
    assert "optimizer_bytes" not in figures.memory  # nothing was kept yet
    watching.on_log(None, progress, None, logs=logs, optimizer=Stepping(True, {}))
    assert logged[0]["grad_norm"] == math.inf
    moments = {"p": {"exp_avg": torch.zeros(10), "exp_avg_sq": torch.zeros(10)}}
    watching.on_optimizer_step(None, progress, None, optimizer=Stepping(False, moments))
    assert figures.memory["optimizer_bytes"] == 80
    with pytest.raises(Diverged, match="grad_norm is inf at step 1"):
        watching.on_log(None, progress, None, logs=logs, optimizer=Stepping(False, {}))
    with pytest.raises(Diverged, match="loss is nan"):
        watching.on_log(None, progress, None, logs={"loss": math.nan}, optimizer=Stepping(True, {}))


def test_gradients_that_overflow_for_ever_are_a_divergence(tmp_path):
    watching, _, _ = watch(tmp_path)
    progress = SimpleNamespace(global_step=7, epoch=0.1)
    for _ in range(49):
        watching.on_optimizer_step(None, progress, None, optimizer=Stepping(True, {}))
    with pytest.raises(Diverged, match=r"overflowed in 50 steps in a row before step 7.*precision=bf16"):
        watching.on_optimizer_step(None, progress, None, optimizer=Stepping(True, {}))


def test_fp16_with_a_gradient_scaler_on_the_cpu(tmp_path, monkeypatch):
    """A real scaler whose first factors overflow: steps are skipped, the run goes on and ends well."""
    from accelerate import Accelerator

    original = loop.PhaseTrainer.__init__

    def with_scaler(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.accelerator.native_amp = True
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)

    monkeypatch.setattr(loop.PhaseTrainer, "__init__", with_scaler)
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    config = config_of(tmp_path, *LLAMA, "method=full", "trainer.max_steps=160")
    monkeypatch.setattr(loop, "MAX_SKIPPED_STEPS", 150)
    record = train(config)
    norms = [line["grad_norm"] for line in steps_of(config)]
    assert record["status"] == "ok"
    assert record["memory"]["optimizer_bytes"] > 0
    assert norms[0] is None  # not finite, so null in JSON
    assert norms[-1] is not None


def test_loss_that_is_not_finite(tmp_path):
    config = config_of(
        tmp_path,
        *LLAMA,
        "method=full",
        "trainer.learning_rate=1e30",
        "trainer.max_grad_norm=null",
        "trainer.max_steps=16",
    )
    with pytest.raises(Diverged, match=r"at step \d+; a lower trainer.learning_rate"):
        train(config)
    record = json.loads((config.folder / "result.json").read_text())
    assert record["status"] == "diverged"
    assert "step" in record["error"]
