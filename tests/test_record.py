"""The run folder: who may use it, what is kept, what is written."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from record_helpers import config, released, started
from text_helpers import composed

from velora.config.run import differing_keys, validate
from velora.errors import ConfigError, RunError
from velora.run.environment import git_state, versions
from velora.run.record import Run


def test_same_configuration_may_continue(tmp_path):
    released(started(tmp_path))
    run = Run(
        config(tmp_path, raw={"trainer": {"max_steps": 3, "device": "cpu"}})
    )  # where it is computed does not count
    assert not run.is_finished()


def test_another_configuration_is_refused_and_the_old_one_stays(tmp_path):
    released(started(tmp_path))
    with pytest.raises(ConfigError, match=r"different: trainer.max_steps\).*overwrite=true"):
        Run(config(tmp_path, raw={"trainer": {"max_steps": 4, "device": "auto"}}))
    assert "max_steps: 3" in (tmp_path / "a/seed0/config.yaml").read_text()


def test_a_run_that_never_began_is_no_obstacle(tmp_path):
    run = Run(config(tmp_path))
    run.start()
    run.finish("failed", "wrong", {})
    released(run)
    assert not Run(config(tmp_path, raw={"trainer": {"max_steps": 4}})).is_finished()


def test_overwrite_leaves_nothing_of_the_old_run(tmp_path):
    run = started(tmp_path)
    (run.folder / "checkpoint-3").mkdir()
    run.finish("failed", "x", {})
    released(run)
    again = Run(config(tmp_path, overwrite=True, raw={"trainer": {"max_steps": 4}}))
    again.start()
    assert sorted(p.name for p in again.folder.iterdir()) == [".lock", "config.yaml"]


def test_two_processes_cannot_write_one_run(tmp_path):
    run = Run(config(tmp_path))
    with pytest.raises(ConfigError, match="another process is writing"):
        Run(config(tmp_path))
    released(run)


def test_resume_required_without_a_run(tmp_path):
    with pytest.raises(ConfigError, match="holds no checkpoint to continue from"):
        Run(config(tmp_path, resume="required"))


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "a").write_text("a file")
    with pytest.raises(ConfigError, match=r"runs_dir=.*cannot be written \(Not a directory\)"):
        Run(config(tmp_path))


def test_result_is_json_without_nan_and_checkpoints_go(tmp_path):
    run = started(tmp_path)
    (run.folder / "checkpoint-3").mkdir()
    run.finish("ok", None, {"metrics": {"loss": float("nan"), "accuracy": 0.5}, "memory": {"weights_bytes": 4}})
    text = (run.folder / "result.json").read_text()
    record = json.loads(text, parse_constant=pytest.fail)
    assert record["metrics"] == {"loss": None, "accuracy": 0.5, "best": {}}
    assert record["memory"]["weights_bytes"] == 4
    assert record["memory"]["peak_allocated_bytes"] is None
    assert not (run.folder / "checkpoint-3").exists()


def test_metrics_rewind_to_the_checkpoint(tmp_path):
    run = started(tmp_path)
    for step in (2, 3):
        run.log({"phase": "train", "step": step})
    run.log({"phase": "other", "step": 9})
    with run.metrics_file.open("a") as file:
        file.write('{"phase": "train", "st')  # cut by a kill
    run.rewind_metrics("train", 2)
    assert [json.loads(line)["step"] for line in run.metrics_file.read_text().splitlines()] == [1, 2, 9]


def test_versions_and_commit():
    assert {"python", "torch", "transformers", "velora"} <= set(versions())
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert git_state()["commit"] == (head.stdout.strip() or None)


@pytest.mark.parametrize(
    "key",
    [
        "experiment.paper.c4.perplexity", "experiment.note", "experiment.published", "experiment.inferred.lr",
        "experiment.unknown", "data.root", "wandb.mode", "trainer.device", "trainer.save_every", "trainer.log_every",
        "trainer.save_model", "trainer.measure_memory", "resume", "overwrite", "runs_dir", "name", "objective",
    ],
)  # fmt: skip
def test_keys_that_do_not_make_another_run(key):
    def raw(value):
        for part in reversed(key.split(".")):
            value = {part: value}
        return value

    assert differing_keys(raw(1), raw(2)) == set()
    assert differing_keys(raw(1), {}) == set()


@pytest.mark.parametrize(
    "key", ["seed", "trainer.num_workers", "trainer.max_steps", "experiment.name", "task.path", "data.split"]
)
def test_keys_that_make_another_run(key):
    group, _, inner = key.partition(".")
    a, b = ({group: {inner: n} if inner else n} for n in (1, 2))
    assert differing_keys(a, b) == {key}
    assert differing_keys(a, {}) == {key}


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        (
            "name",
            "a" * 300,
            f"name={'a' * 40}...: a part of it has 300 bytes, and a file system takes 255; give a shorter name",
        ),
        ("name", "x/" + "ä" * 128, "a part of it has 256 bytes"),
        ("name", "a/../b", "name=a/../b leaves runs_dir"),
        ("name", "a\x1b[31mb", r"name='a\x1b[31mb' holds a character that cannot be printed"),
        ("name", "a/seed0", "name=a/seed0: seed0 would lie inside the folder of another run"),
        ("seed", 99999999999, "seed=99999999999 is not valid: input should be less than or equal to 4294967295"),
        ("seed", -1, "seed=-1 is not valid"),
        ("seed", True, "seed=true is not valid: input should be an integer"),
        ("seed", 1.0, "seed=1.0 is not valid: input should be an integer"),
    ],
)
def test_names_and_seeds_that_cannot_be(key, value, sentence):
    with pytest.raises(ConfigError) as refused:
        validate({**composed().raw, key: value})
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    ("key", "value"), [("name", "ä" * 127 + "/" + "b" * 255), ("name", "seeds/seed_0"), ("seed", 2**32 - 1)]
)
def test_names_and_seeds_at_their_limits(key, value):
    assert getattr(validate({**composed().raw, key: value}), key) == value


def test_scores_of_numpy_and_torch_are_numbers(tmp_path):
    run = started(tmp_path)
    scores = {"a": np.float32(0.5), "b": np.int64(3), "c": torch.tensor(0.25), "d": np.float64("nan")}
    run.log({"phase": "train", "step": 2, **scores})
    assert json.loads(run.metrics_file.read_text().splitlines()[-1]) == {
        "phase": "train", "step": 2, "a": 0.5, "b": 3, "c": 0.25, "d": None,
    }  # fmt: skip
    assert run.finish("ok", None, {"metrics": scores})["metrics"] == {
        "a": 0.5,
        "b": 3,
        "c": 0.25,
        "d": None,
        "best": {},
    }


def test_a_score_that_is_no_number(tmp_path):
    run = started(tmp_path)
    with pytest.raises(RunError, match=r"the metric accuracy='high': is not a number"):
        run.log({"phase": "train", "step": 2, "accuracy": "high"})
    with pytest.raises(RunError, match=r"does not fit into result.json \(metrics.accuracy='high': is not a number\)"):
        run.finish("ok", None, {"metrics": {"accuracy": "high"}})
    left = json.loads((run.folder / "result.json").read_text())
    assert left["status"] == "failed"
    assert "accuracy='high'" in left["error"]
    assert run.finish("diverged", "loss is nan", {"memory": {"weights_bytes": "4"}})["status"] == "diverged"
