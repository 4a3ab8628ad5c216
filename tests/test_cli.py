"""Bad input: one sentence, exit status 2, no traceback, nothing half-written, and all of it before torch is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

from velora.cli import default_name, expand_globs
from velora.errors import ConfigError

REFUSED = {
    "unknown method": (["method=veloar"], "method=veloar is not known", "velora"),
    "unknown model": (["model=llama_61m"], "model=llama_61m is not known", "llama_60m"),
    "unknown task": (["task=glue/sst3"], "glue/sst3", "sst2"),
    "misspelt key": (["trainer.lerning_rate=1"], "trainer.lerning_rate is not a key", "trainer.learning_rate"),
    "added key": (["+trainer.lerning_rate=1"], "trainer.lerning_rate is not a key", "trainer.learning_rate"),
    "both": (["activations.num_groups=4"], "both are given", "set the other to null"),
    "neither": (["activations.sub_token_size=null"], "none is given", "exactly one"),
    "wrong type": (["trainer.batch_size=many"], "trainer.batch_size=many", "integer"),
    "negative": (["trainer.batch_size=-1"], "trainer.batch_size=-1", "greater than 0"),
    "no end": (["trainer.max_steps=null"], "trainer.max_steps=null", "give one of them"),
    "no data folder": (["data.root=nowhere"], "data.root=nowhere is not a folder", "leave it out"),
    "task for another family": (["task=glue/sst2", "model=llama_tiny"], "task=glue/sst2", "choose another model or task"),
    "model without a path": (["model=causal_lm"], "model.path has no value", "give model.path="),
    "pretrained without a path": (["model=llama_60m", "model.pretrained=true"], "model.pretrained=true", "model.path=DIR"),
    "moment out of range": (["optimizer.betas=[0.9,1.5]"], "optimizer.betas.1=1.5", "less than 1"),
    "half a step": (["trainer.eval_every=1.5"], "trainer.eval_every=1.5", "a fraction of the run below 1"),
    "another value's key": (
        ["method=lora_velora", "activations=exact"], "activations.layers is a key of activations=velora", "method"
    ),
    "embedded task": (["task=embedded", "+task.options.manul.max_length=9"], "task.options.manul is not a key", "manual"),
    "embedded task's key": (
        ["task=embedded", "+task.options.manual.max_lenght=9"], "options.manual.max_lenght", "options.manual.max_length"
    ),
    "key of a value not chosen": (
        ["method=full", "activations.layers=[value]"], "activations.layers is a key of another value", "activations=..."
    ),
    "no such package": (["adapter.kind=nowhere.to.be.found"], "adapter.kind=nowhere.to.be.found", "import path"),
    "nothing to continue": (["resume=required"], "resume=required", "resume=auto"),
    "name outside": (["name=a/../../b"], "name=a/../../b leaves runs_dir", "without .."),
    "syntax": (["trainer.max_steps=]["], "trainer.max_steps=][", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_one_sentence(cli, case):
    overrides, names, remedy = REFUSED[case]
    done = cli(*overrides)
    assert done.returncode == 2, done.stderr
    assert names in done.stderr
    assert remedy in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (cli.folder / "runs").exists()


def test_several_problems_in_one_message(cli):
    done = cli("trainer.batch_size=0", "++optimizer.bettas=[0,0]", "activations.init=best")
    assert done.returncode == 2
    for key in (
        "trainer.batch_size=0",
        "optimizer.bettas is not a key; did you mean optimizer.betas?",
        "activations.init=best",
    ):
        assert key in done.stderr


def test_misspelt_key_in_a_file(cli):
    folder = cli.folder / "mine" / "method"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("# @package _global_\nmethod: {name: mine}\nactivations: {sub_tokensize: 8}\n")
    done = cli("--config-dir", "mine", "method=mine")
    assert done.returncode == 2
    assert "activations.sub_tokensize is not a key" in done.stderr


def test_output_folder_that_cannot_be_written(cli):
    (cli.folder / "file").write_text("")
    done = cli("runs_dir=file/runs")
    assert done.returncode == 2
    assert "runs_dir=file/runs" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["method=nothing"], ["trainer.batch_size=0"]])
def test_answers_without_heavy_imports(tmp_path, arguments):
    code = (
        "import sys\n"
        "from velora.cli import train\n"
        "try:\n    train()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'timm', 'peft', 'numpy'} & set(sys.modules)\n"
        "sys.stderr.write(f'heavy={sorted(heavy)}')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert "heavy=[]" in done.stderr


def test_value_files_import_no_torch(tmp_path):
    code = (
        "import sys, pkgutil, importlib, velora\n"
        "from velora.config import GROUPS\n"
        "for group in GROUPS:\n"
        "    package = importlib.import_module('velora.' + group)\n"
        "    for module in (m for m in pkgutil.iter_modules(package.__path__) if m.name[0] != '_'):\n"
        "        importlib.import_module(f'velora.{group}.{module.name}')\n"
        "print({'torch', 'transformers', 'timm', 'peft'} & set(sys.modules) or 'light')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "light", done.stderr


def test_globs_reach_nested_values_and_never_match_nothing(tmp_path):
    (tmp_path / "task" / "mine").mkdir(parents=True)
    (tmp_path / "task" / "mine" / "a.yaml").write_text("")
    glue = ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli"]
    assert expand_globs(["-m", "task=glob(glue/*)"]) == ["-m", "task=" + ",".join(f"glue/{name}" for name in glue)]
    assert expand_globs(["task=glob(glue/s*)", "seed=1"]) == ["task=glue/sst2,glue/stsb", "seed=1"]
    assert expand_globs(["--config-dir", str(tmp_path), "task=glob(mine/*)"])[-1] == "task=mine/a"
    assert "glue/sst2" not in expand_globs(["task=glob(*)"])[0]
    untouched = ["method=glob(*,exclude=l*)", "trainer.batch_size=4"]
    assert expand_globs(untouched) == untouched
    with pytest.raises(ConfigError, match=r"task=glob\(gleu/\*\) matches nothing; task is one of .*glue/sst2"):
        expand_globs(["task=glob(gleu/*)"])


def test_name_holds_what_changes_the_result():
    raw = {"task": {"name": "glue/sst2"}, "model": {"name": "minilm"}, "method": {"name": "velora"}, "experiment": None}
    assert default_name(raw, ["method=velora", "data.root=/some/where", "seed=3"]) == "glue_sst2-minilm-velora"
    swept = default_name(raw, ["trainer.max_steps=3", "activations.sub_token_size=8"])
    assert swept == "glue_sst2-minilm-velora-activations.sub_token_size=8-trainer.max_steps=3"
    assert len(default_name(raw, [f"model.path=/{'x' * 300}"])) < 255
