"""The door for notebooks and scripts: velora.compose and velora.train, against the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from loop_helpers import ROBERTA, SHORT

import velora
from velora.cli import launch
from velora.config.run import Config
from velora.errors import ConfigError


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch):
    """Exit status and configuration of `velora-train <arguments>`, which does not train."""

    def run(*arguments: str) -> tuple[int, list[Config]]:
        found: list[Config] = []
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        monkeypatch.setattr("sys.argv", ["velora-train", *arguments])
        return launch("velora-train", lambda config: found.append(config)), found

    return run


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["method=lora", "task=glue/sst2", "model=roberta_tiny", "adapter.rank=2", "wandb.tags=[a,b]", "seed=3"],
        ["experiment=table4/lora", "model=llama_130m"],
        ["experiment=smoke", "model=vit_tiny", "+experiment.note='why: not'"],
        ["task=glob(manu*)", "trainer.max_steps=${trainer.batch_size}"],
    ],
    ids=" ".join,
)
def test_compose_is_the_command_line(command_line, overrides: list[str]) -> None:
    status, (theirs,) = command_line(*overrides)
    assert status == 0
    mine = velora.compose(*overrides)
    assert mine.raw == theirs.raw
    assert mine == theirs


def test_a_folder_with_groups_of_ones_own(command_line, tmp_path: Path) -> None:
    folder = tmp_path / "it's \\ mine (1)"
    (folder / "method").mkdir(parents=True)
    (folder / "method" / "mine.yaml").write_text("name: mine\n")
    status, (theirs,) = command_line("--config-dir", str(folder), "method=mine")
    assert status == 0
    assert velora.compose("method=mine", config_dir=folder).raw == theirs.raw
    assert theirs.method.name == "mine"


@pytest.mark.parametrize(
    "overrides",
    [
        "method=veloar", "trainer.lr=1", "+trainer.lr=1", "trainer.batch_size=0", "trainer.batch_size=4,8", "task=glob(x*)",
        "data.root=/a,b", "model=causal_lm", "trainer.max_steps=${nope}", "trainer.max_steps=${oc.env:VELORA_NOT_SET}",
        "experiment=table2/lora task=glue/wnli", "objective=accuracy", "resume=perhaps",
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_as_on_the_command_line(command_line, capsys, overrides: str) -> None:
    status, _ = command_line(*overrides.split())
    assert status == 2
    with pytest.raises(ConfigError) as refused:
        velora.compose(*overrides.split())
    assert f"velora-train: {refused.value}\n" == capsys.readouterr().err


@pytest.mark.parametrize("option", ["-m", "--help", "--cfg=job"])
def test_an_option_is_not_an_override(option: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        velora.compose(option)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere is not a folder"):
        velora.compose(config_dir=tmp_path / "nowhere")


def test_a_copy_with_another_part_keeps_the_rest() -> None:
    config = velora.compose("method=velora", "name=a/b", "runs_dir=/somewhere")
    copy = config.model_copy(update={"adapter": velora.compose("method=lora").adapter})
    assert (copy.adapter.kind, copy.activations, copy.raw) == ("lora", config.activations, config.raw)
    assert copy.folder == Path("/somewhere/a/b/seed0")
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1


def test_import_and_compose_are_light() -> None:
    code = "import sys, velora; velora.compose('method=lora'); print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr


def test_train_returns_the_record_and_does_not_run_twice(tmp_path: Path, monkeypatch, capsys) -> None:
    overrides = [*SHORT, *ROBERTA, "method=velora", "name=mine", f"runs_dir={tmp_path}"]
    config = velora.compose(*overrides)
    record = velora.train(config)
    file = config.folder / "result.json"
    assert record["status"] == "ok"
    assert record == json.loads(file.read_text())
    written = file.stat().st_mtime_ns

    monkeypatch.setattr("velora.run.run.execute", lambda *_: pytest.fail("it ran again"))
    elsewhere = [f"data.root={tmp_path}", "trainer.log_every=2", "objective=metrics.loss", "wandb.project=another"]
    assert velora.train(velora.compose(*overrides, *elsewhere)) == record  # nothing of this makes another run
    assert file.stat().st_mtime_ns == written
    assert "finished; overwrite=true runs it again" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"holds a run with another configuration \(different: trainer.max_steps\)"):
        velora.train(velora.compose(*overrides, "trainer.max_steps=5"))
