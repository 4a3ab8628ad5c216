"""trainer.sharding=fsdp in two gloo processes: the curve of one process, shards in the record, resume, what is refused.

Both processes run the whole list of runs in one start; the tests look at what they left, and at runs of one process on the
joint batch.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from loop_helpers import LLAMA, ROBERTA, config_of, lines_of, steps_of, train
from safetensors.torch import load_file
from torch import nn
from two_processes import run_in_two_processes

from velora.config.optimizer import LOMO, Adafactor, AdamW, AdamW8bit, FLoRA, GaLore, Grass
from velora.config.run import Config, differing_keys
from velora.errors import ConfigError, Diverged
from velora.run.arguments import training_arguments, use_one_device
from velora.run.sharding import shard

COMMON = ["trainer.eval_batch_size=64"]
MEASURED = [*LLAMA, *COMMON, "trainer.measure_memory=true"]
ACCUMULATED = [*LLAMA, *COMMON, "method=velora", "weights.dtype=bf16", "recompute=lean"]
SAME = {
    "full": [*MEASURED, "method=full", "trainer.save_model=true"],
    "lora": [*MEASURED, "method=lora", "trainer.save_model=true"],
    "velora": [*MEASURED, "method=velora", "trainer.eval_every=2", "model.architecture.tie_word_embeddings=true"],
    "blocks": [*LLAMA, *COMMON, "method=lora_velora", "recompute=blocks", "trainer.precision=bf16"],
    "roberta": [*ROBERTA, *COMMON, "method=hydra_velora", "trainer.max_grad_norm=null"],
}
RESUMED = ["method=velora", "activations.init=running_average", "trainer.save_every=2"]
WHOLE = [*LLAMA, *COMMON, *RESUMED, "+model.architecture.attention_dropout=0.1"]
ADAPTER = [*LLAMA, *COMMON, *RESUMED, "method=lora_velora", "adapter.dropout=0.1"]
FSDP = ["trainer.sharding=fsdp"]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """The folder of the runs in two processes."""
    folder = tmp_path_factory.mktemp("sharding")
    runs = {name: ([*overrides, *FSDP], None) for name, overrides in SAME.items()}
    runs["accumulated"] = ([*ACCUMULATED, *FSDP, "trainer.micro_batch_size=2"], None)
    for name, overrides in {"fsdp": [*WHOLE, *FSDP], "ddp": WHOLE, "adapter": [*ADAPTER, *FSDP]}.items():
        runs |= {f"{name} whole": (overrides, None), f"{name} broken": (overrides, 3)}
    (folder / "runs.json").write_text(json.dumps(runs))
    run_in_two_processes("sharding_worker.py", folder, timeout=600, VELORA_TRACEBACK="1")
    return folder / "two"


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Callable[[str], Config]:
    """The run of one process on the joint batch; each is trained once."""
    folder = tmp_path_factory.mktemp("one")

    @functools.cache
    def trained(name: str) -> Config:
        config = run_of(folder / name, *SAME[name])
        train(config)
        return config

    return trained


def run_of(folder: Path, *overrides: str):
    return config_of(folder, *(o for o in overrides if o not in FSDP))  # where it lies, not how it was made


def record_of(config) -> dict:
    return json.loads((config.folder / "result.json").read_text())


def figures(config) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in steps_of(config)]


def tolerance(overrides: list[str]) -> float:
    """fp32: a sum over two processes is in another order. bf16: each process rounds its gradient, and the norm, to 8 bits."""
    return 8e-3 if any("bf16" in o for o in overrides) else 1e-5


@pytest.mark.parametrize("name", SAME)
def test_curve_and_scores_are_those_of_one_process_on_the_joint_batch(two, one, name):
    sharded, whole = run_of(two / name, *SAME[name]), one(name)
    assert len(figures(whole)) == 4
    for got, expected in zip(figures(sharded), figures(whole), strict=True):
        assert got == pytest.approx(expected, rel=tolerance(SAME[name]))
    got, expected = record_of(sharded), record_of(whole)
    assert got["metrics"]["loss"] == pytest.approx(expected["metrics"]["loss"], rel=tolerance(SAME[name]))
    assert got["parameters"] == expected["parameters"]


def test_accumulated_gradients_are_those_of_one_process(two, tmp_path):
    """With recompute=lean. Two forwards of 2 examples in two processes are two of 4 in one; the direction is of four."""
    one = run_of(tmp_path, *ACCUMULATED, "trainer.micro_batch_size=4")
    train(one)
    sharded = run_of(two / "accumulated", *ACCUMULATED)
    for got, expected in zip(figures(sharded), figures(one), strict=True):
        assert got == pytest.approx(expected, rel=tolerance(ACCUMULATED))


@pytest.mark.parametrize("name", ["full", "lora", "velora"])
def test_the_record_counts_the_parts_of_one_process(two, one, name, tmp_path):
    """By hand: of n rows the first process has ceil(n / 2), also where they are not trained; buffers and step counts are whole."""
    network = build(name, tmp_path)
    parts = {p: math.ceil(p.shape[0] / 2) * p[0].numel() * p.element_size() for p in network.parameters()}
    trained = [p for p in parts if p.requires_grad]
    buffers = record_of(one(name))["memory"]["weights_bytes"] - sum(p.nbytes for p in parts)
    memory = record_of(run_of(two / name, *SAME[name]))["memory"]
    assert memory["weights_bytes"] == sum(parts.values()) + buffers
    assert memory["gradients_bytes"] == sum(parts[p] for p in trained)
    assert record_of(run_of(two / name, *SAME[name]))["device"].endswith("one of 2 processes")
    assert memory["optimizer_bytes"] == sum(2 * parts[p] + 4 for p in trained)


def test_each_process_keeps_activations_of_its_own_examples(two, tmp_path):
    """Whole layers of half the batch, and none of the gathered parameters: the ledger of one process with half the batch."""
    half = run_of(tmp_path, *SAME["full"], "trainer.batch_size=4", "trainer.max_steps=1")
    train(half)
    expected = record_of(half)["memory"]["saved_for_backward_bytes"]
    assert record_of(run_of(two / "full", *SAME["full"]))["memory"]["saved_for_backward_bytes"] == expected


def build(method: str, folder: Path) -> nn.Module:
    from velora.memory.meter import preprocessor_for_shapes
    from velora.models.build import build_network

    config = config_of(folder, *SAME[method])
    return build_network(config, config.task.head(config), preprocessor_for_shapes(config))[0]


@pytest.mark.parametrize("name", ["fsdp", "ddp", "adapter"])
def test_a_run_continues_on_its_curve(two, name):
    """Killed at step 3 and continued from the checkpoint of step 2, bit for bit; with dropout and moving directions."""
    overrides = ADAPTER if name == "adapter" else WHOLE
    whole, broken = (run_of(two / f"{name} {part}", *overrides) for part in ("whole", "broken"))
    assert [line["step"] for line in steps_of(broken)] == [1, 2, 3, 4]
    assert lines_of(broken) == lines_of(whole)
    assert record_of(broken)["memory"] == record_of(whole)["memory"]


def test_whole_weights_are_saved(two, one):
    """`trainer.save_model=true` writes what one process writes."""
    for name, file in (("full", "model.safetensors"), ("lora", "adapter_model.safetensors")):
        expected = load_file(one(name).folder / "model" / file)
        saved = load_file(run_of(two / name, *SAME[name]).folder / "model" / file)
        assert saved.keys() == expected.keys()
        for key, tensor in saved.items():
            # AdamW divides by the root of a small number, so the order of a sum shows; 4 steps of 1e-3 change a weight by 4e-3
            torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-5)
    config = json.loads((run_of(two / "full", *SAME["full"]).folder / "model" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_mixed_types_in_one_unit_are_refused(monkeypatch):
    monkeypatch.setattr("velora.run.sharding.init_device_mesh", lambda *_: None)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).bfloat16())
    with pytest.raises(ConfigError, match=r"of Sequential are bfloat16 and float32.*weights\.dtype=fp32"):
        shard(model, torch.device("cpu"))


def test_several_visible_gpus_do_not_multiply_the_batch(tmp_path, capsys):
    """Without torchrun Trainer would take DataParallel: its n_gpu decides on it, and is a factor of the batch."""
    arguments = training_arguments(config_of(tmp_path, *LLAMA), tmp_path, "end")
    arguments._n_gpu = 4
    assert arguments.train_batch_size == 32
    use_one_device(arguments)
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, 8)
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_runs_of_versions_without_the_key_are_runs_that_are_not_sharded():
    assert differing_keys({"trainer": {"max_steps": 1}}, {"trainer": {"max_steps": 1, "sharding": "none"}}) == set()
    assert differing_keys({"trainer": {}}, {"trainer": {"sharding": "fsdp"}}) == {"trainer.sharding"}


def test_which_optimisers_take_shards():
    assert AdamW.takes_shards
    assert not any(kind.takes_shards for kind in (Adafactor, AdamW8bit, FLoRA, GaLore, Grass, LOMO))


def test_what_keeps_shards_from_being_written_is_the_error(monkeypatch, tmp_path):
    """torch's own is no Exception and names no reason; the loop makes a sentence out of this one."""
    from torch.distributed.checkpoint import CheckpointException

    from velora.run import sharding

    def full(*_, **__):
        raise CheckpointException("write", {1: (OSError(28, "No space left on device"), None)})

    monkeypatch.setattr(sharding, "_state", lambda *_: {})
    monkeypatch.setattr("torch.distributed.checkpoint.save", full)
    with pytest.raises(OSError, match="No space left"):
        sharding.save_shards(tmp_path / "checkpoint-2", nn.Linear(2, 2), None, None)


def test_a_checkpoint_with_nan_is_diverged_on_all_processes(monkeypatch):
    from velora.run import sharding

    monkeypatch.setattr("torch.distributed.all_reduce", lambda count: count.add_(1))  # another process found one
    with pytest.raises(Diverged, match="in another process"):
        sharding._refuse_non_finite(nn.Linear(2, 2), "checkpoint-2")
