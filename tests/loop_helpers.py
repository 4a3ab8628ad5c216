"""Runs of the training loop inside the test's own process: quick, and open to being interrupted at a chosen moment."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from text_helpers import composed
from two_processes import run_in_two_processes

import velora
from velora.config.parts import Phase
from velora.config.run import Config

LLAMA = ["task=manual", "model=llama_tiny", "model.architecture.num_hidden_layers=2", "model.architecture.hidden_size=32",
         "model.architecture.intermediate_size=48", "model.architecture.num_attention_heads=4",
         "model.architecture.num_key_value_heads=4", "task.max_length=32"]  # fmt: skip
ROBERTA = ["model=roberta_tiny", "task=topics", "model.architecture.num_hidden_layers=2", "task.max_length=32",
           "+model.architecture.hidden_dropout_prob=0", "+model.architecture.attention_probs_dropout_prob=0"]  # fmt: skip
VIT = ["task=digits", "model=vit_tiny", "model.overrides.depth=2", "task.protocol=last"]
FAMILIES = {"llama": LLAMA, "roberta": ROBERTA, "vit": VIT}

SHORT = ["trainer.num_epochs=null", "trainer.max_steps=4", "trainer.batch_size=8", "trainer.log_every=1", "trainer.eval_every=end",
         "trainer.save_every=end", "trainer.learning_rate=1e-3", "trainer.warmup_ratio=0", "trainer.warmup_steps=0",
         "trainer.schedule=constant", "trainer.min_lr_ratio=0", "trainer.measure_memory=false", "wandb.mode=disabled"]  # fmt: skip


def write_texts(root: Path, num_train: int = 64, num_validation: int = 8) -> Path:
    """A folder `short` below `root` for task=c4: texts of different length, so that micro-batches have different weights."""
    (root / "short").mkdir(parents=True, exist_ok=True)
    draw = random.Random(1)
    for side, number in (("train", num_train), ("validation", num_validation)):
        documents = [{"text": "word " * draw.randint(1, 6)} for _ in range(number)]
        (root / "short" / f"{side}.json").write_text("".join(json.dumps(d) + "\n" for d in documents))
    return root


def config_of(folder: Path, *overrides: str) -> Config:
    return composed(*SHORT, f"runs_dir={folder}", *overrides)


train = velora.train


def lines_of(config: Config) -> list[dict[str, Any]]:
    """metrics.jsonl."""
    return [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()]


def steps_of(config: Config) -> list[dict[str, Any]]:
    """Its lines of training steps."""
    return [line for line in lines_of(config) if "loss" in line]


def curve(config):
    return [(line["loss"], line["grad_norm"]) for line in steps_of(config)]


def train_in_two_processes(runs: dict[str, list[str]], folder: Path) -> None:
    """Two gloo processes under torchrun's environment, all runs in one start, into <folder>/two/<name>."""
    (folder / "runs.json").write_text(json.dumps(runs))
    run_in_two_processes("loop_worker.py", folder)


PHASE = Phase("train", None, {"": None})


class Killed(BaseException):
    """Ends a run as a kill would: nothing of ours catches it."""


def kill_when(monkeypatch, method, moment):
    """Raise out of PhaseTrainer.<method> the first time that `moment(trainer)` holds; the later start is not disturbed."""
    from velora.run.train import PhaseTrainer

    original = getattr(PhaseTrainer, method)
    killed = []

    def until(self, *args, **kwargs):
        if not killed and moment(self):
            killed.append(True)
            raise Killed
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PhaseTrainer, method, until)
