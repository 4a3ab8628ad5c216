"""Every method and optimiser, killed at four moments of one run and started again: every logged number is that of a whole run.

The moments: between two checkpoints, in an evaluation, while a checkpoint is written (its folder is there, half full), and in
the last evaluation, when the checkpoint is that of the last step.
"""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from loop_helpers import LLAMA, ROBERTA, VIT, config_of, lines_of, train, write_texts

from velora.run import train as loop

TEXT = [*LLAMA[1:], "task=c4", "task.folder=short", "task.shuffle_buffer=4"]

CONFIGURATIONS: dict[str, list[str]] = {
    **{method: [*TEXT, f"method={method}"] for method in (
        "full", "linear_probe", "lora", "qlora", "ssf", "hydra", "galore", "grass", "flora", "velora", "velora_all",
        "lora_velora", "qlora_velora", "hydra_velora", "checkpoint",
    )},
    "ssf_velora": [*TEXT, "method=ssf_velora", "activations.sub_token_size=16"],
    "adamw_8bit": [*TEXT, "method=full", "optimizer=adamw_8bit"],
    "adafactor": [*TEXT, "method=full", "optimizer=adafactor"],
    "lomo": [*TEXT, "method=full", "optimizer=lomo", "trainer.max_grad_norm=null"],
    "galore 8 bit": [*TEXT, "method=galore", "optimizer.bits=8"],
    "galore layer-wise": [*TEXT, "method=galore", "optimizer.layerwise=true", "trainer.max_grad_norm=null"],
    "q_galore": [*TEXT, "method=q_galore_velora", "optimizer.update_proj_gap=1", "optimizer.cos_threshold=0.1"],
    "grass, sampled": [*TEXT, "method=grass_velora", "optimizer.selection=sampled", "optimizer.update_gap=3"],
    "flora layer-wise, accumulated": [
        *TEXT, "method=flora", "optimizer.layerwise=true", "trainer.max_grad_norm=null", "trainer.micro_batch_size=4",
    ],
    "running average": [*TEXT, "method=velora", "activations.init=running_average"],
    "svd, accumulated": [*TEXT, "method=velora", "activations.init=svd", "trainer.micro_batch_size=2"],
    "random, bf16 weights": [*TEXT, "method=velora", "activations.init=random", "weights.dtype=bf16"],
    "autocast": [*TEXT, "method=velora", "trainer.precision=bf16"],
    "dropout": [*TEXT, "method=lora_velora", "adapter.dropout=0.2"],
    "roberta": [*ROBERTA[:-2], "method=velora"],
    "vit": [*VIT[:-1], "task.protocol=best_on_test", "method=ssf_velora", "model.drop_path=0.2"],
}  # fmt: skip
EACH_TIME = {
    "full", "qlora", "grass, sampled", "galore layer-wise", "flora layer-wise, accumulated", "running average",
    "dropout", "roberta", "vit",
}  # fmt: skip
"""One of each kind of state and of loop; the others, whose parts have tests of their own, with `pytest -m slow`."""
LOOP = ["trainer.max_steps=16", "trainer.eval_every=5", "trainer.save_every=4", "trainer.schedule=cosine",
        "trainer.warmup_steps=2", "trainer.measure_memory=true"]  # fmt: skip


class Killed(BaseException):
    """Nothing of ours catches it."""


def kill_once(monkeypatch: pytest.MonkeyPatch, target: Any, method: str, step: int) -> None:
    """Raise out of `target.<method>` when it is called at `step` for the first time."""
    original, killed = getattr(target, method), []

    def until(self, *args, **kwargs):
        if not killed and self.state.global_step == step:
            killed.append(step)
            raise Killed
        return original(self, *args, **kwargs)

    monkeypatch.setattr(target, method, until)


@pytest.mark.parametrize(
    "name", [name if name in EACH_TIME else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGURATIONS]
)
def test_a_run_killed_four_times_is_the_whole_run(name, monkeypatch, tmp_path):
    common = [*CONFIGURATIONS[name], *LOOP]
    if "task=c4" in common:
        common.append(f"data.root={write_texts(tmp_path)}")
    whole, broken = (config_of(tmp_path / folder, *common) for folder in ("whole", "broken"))
    expected = train(whole)
    kill_once(monkeypatch, loop.PhaseTrainer, "training_step", 6)
    kill_once(monkeypatch, loop.PhaseTrainer, "evaluate", 10)
    kill_once(monkeypatch, transformers.Trainer, "_save_optimizer_and_scheduler", 12)
    kill_once(monkeypatch, loop.PhaseTrainer, "evaluate", 16)
    for reached in (6, 10, 12, 16):
        with pytest.raises(Killed):
            train(broken)
        assert max(line["step"] for line in lines_of(broken)) == reached
    record = train(broken)
    assert lines_of(broken) == lines_of(whole)
    assert record["metrics"] == expected["metrics"]
    assert record["memory"] == expected["memory"]
    assert record["parameters"] == expected["parameters"]
    assert not list(broken.folder.glob("checkpoint-*"))
