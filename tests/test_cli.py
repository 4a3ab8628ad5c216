"""The command line: what it answers without the heavy imports, shipped choices, globs, names; refusals: test_bad_inputs.py."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest
from velora.config.overrides import checked, quoted

from velora.cli import default_name


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


def test_the_configuration_imports_no_torch(tmp_path):
    code = (
        "import sys, pkgutil, importlib, velora.config\n"
        "for module in pkgutil.iter_modules(velora.config.__path__):\n"
        "    importlib.import_module(f'velora.config.{module.name}')\n"
        "print({'torch', 'transformers', 'timm', 'peft'} & set(sys.modules) or 'light')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "light", done.stderr


def test_globs_reach_nested_values_and_never_match_nothing(tmp_path):
    (tmp_path / "task" / "mine").mkdir(parents=True)
    (tmp_path / "task" / "mine" / "a.yaml").write_text("")
    glue = ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli"]
    assert checked(["-m", "task=glob(glue/*)"]) == ["-m", "task=" + ",".join(f"glue/{name}" for name in glue)]
    assert checked(["-m", "task=glob(glue/s*)", "seed=1"]) == ["-m", "task=glue/sst2,glue/stsb", "seed=1"]
    assert checked(["-m", "--config-dir", str(tmp_path), "task=glob(mine/*)"])[-1] == "task=mine/a"
    assert checked(["-m", "task=glob([manual,glue/s*],exclude=glue/stsb)"])[-1] == "task=glue/sst2,manual"
    assert checked(["-m", "method=glob(*,exclude=[*lora*,s*,f*])"])[-1] == "method=checkpoint,galore,hydra,linear_probe"
    assert checked(["task=glob(man*)"]) == ["task=manual"]
    assert "glue/sst2" not in checked(["-m", "task=glob(*)"])[-1]
    untouched = ["trainer.batch_size=4", "data.root='/a,b'", "~experiment", "+trainer.compile=true"]
    assert checked(untouched) == untouched


def test_name_holds_what_changes_the_result():
    raw = {"task": {"name": "glue/sst2"}, "model": {"name": "minilm"}, "method": {"name": "velora"}, "experiment": None}
    assert default_name(raw, ["method=velora", "data.root=/some/where", "seed=3"]) == "glue_sst2-minilm-velora"
    swept = default_name(raw, ["trainer.max_steps=3", "activations.sub_token_size=8"])
    assert swept == "glue_sst2-minilm-velora-activations.sub_token_size=8-trainer.max_steps=3"
    assert len(default_name(raw, [f"model.path=/{'x' * 300}"])) < 255


@pytest.mark.parametrize(
    "text", ["~/x", "a=b", "a,b", "a(b", "[a", "a: {b", "a b", 'a"b', "a\\", 'a\\"b', "C:\\d", "it's"]
)
def test_the_quotes_that_a_sentence_proposes_give_the_text(text):
    """What is proposed is copied into a shell, which gives Hydra one argument."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (argument,) = shlex.split(quoted(f"data.root={text}"))
    override = OverridesParser.create().parse_overrides([argument])[0]
    assert (override.key_or_group, override.value()) == ("data.root", text)
