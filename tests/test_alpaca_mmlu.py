"""Training on Alpaca, judged by MMLU: at the end, after each epoch, without a training, and when it was interrupted on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mmlu_helpers import subject, write_subject
from test_alpaca import words, write

import velora
from velora.errors import Interrupted

SMALL = (
    "task=alpaca_mmlu", "method=full", "model=llama_tiny", "task.max_length=192", "task.held_out=4",
    "model.architecture={hidden_size:32,intermediate_size:48,num_hidden_layers:1,max_position_embeddings:2048}",
    "task.mmlu.subjects=[anatomy,astronomy]", "trainer.num_epochs=3", "trainer.batch_size=4", "trainer.eval_batch_size=4",
    "trainer.warmup_steps=0", "trainer.device=cpu", "trainer.eval_every=epoch", "trainer.save_every=epoch",
)  # fmt: skip
NUM_ROWS, NUM_STEPS = 24, 5  # a step of four of the twenty rows that train


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, words(NUM_ROWS))
    for name in ("anatomy", "astronomy"):
        write_subject(tmp_path, subject(name, 5))
    return tmp_path


def train(root: Path, name: str, *more: str) -> dict[str, Any]:
    given = (*SMALL, f"data.root={root}", f"name={name}", f"runs_dir={root / 'runs'}", *more)
    return velora.train(velora.compose(*given))


def lines(root: Path, name: str) -> list[dict[str, Any]]:
    text = (root / "runs" / name / "seed0" / "metrics.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if "mmlu_micro" in line]


def test_at_the_end(root: Path) -> None:
    record = train(root, "end")
    (line,) = lines(root, "end")
    assert line["step"] == 3 * NUM_STEPS
    assert record["metrics"]["mmlu_micro"] == line["mmlu_micro"]
    assert record["metrics"]["loss"] > 0
    assert record["data"]["mmlu"]["questions"] == 10
    assert record["data"]["held_out"]["rows"] == 4


def test_after_each_epoch(root: Path) -> None:
    record = train(root, "each", "task.mmlu_every=epoch")
    assert [line["step"] for line in lines(root, "each")] == [NUM_STEPS, 2 * NUM_STEPS, 3 * NUM_STEPS]
    assert [line["epoch"] for line in lines(root, "each")][:2] == [1.0, 2.0]
    plain = train(root, "end")
    for key in ("loss", "mmlu_micro", "mmlu_macro"):  # the benchmark on the way changes nothing of the training
        assert record["metrics"][key] == plain["metrics"][key]


def test_without_a_training(root: Path) -> None:
    record = train(root, "none", "trainer.max_steps=0", "trainer.num_epochs=null")
    assert record["metrics"]["mmlu_counts"]["questions"] == 10
    assert record["memory"]["gradients_bytes"] is None


def test_interrupted_in_the_benchmark_of_an_epoch(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import velora.eval.mmlu as module

    whole = train(root, "whole", "task.mmlu_every=epoch")
    real, calls = module.next_token_log_probs, []

    def stopped_in_the_second_epoch(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:  # the second subject after the second epoch
            raise KeyboardInterrupt("stopped by SIGTERM")
        return real(*args, **options)

    monkeypatch.setattr(module, "next_token_log_probs", stopped_in_the_second_epoch)
    with pytest.raises(Interrupted, match="the same command continues it"):
        train(root, "stopped", "task.mmlu_every=epoch")
    record = train(root, "stopped", "task.mmlu_every=epoch")
    assert record["metrics"] == whole["metrics"]
    assert [(line["step"], line["mmlu_micro"]) for line in lines(root, "stopped")] == [
        (line["step"], line["mmlu_micro"]) for line in lines(root, "whole")
    ]
