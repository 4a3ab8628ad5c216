"""The command line: what it answers without the heavy imports, shipped choices, globs, names; refusals: test_bad_inputs.py."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest
from hydra.experimental.callback import Callback

import velora.cli
from velora.config.compose import checked, default_name, quoted
from velora.errors import RunError


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

    def written(arguments):
        return checked(arguments)[0]

    glue = ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli"]
    assert written(["-m", "task=glob(glue/*)"]) == ["-m", "task=" + ",".join(f"glue/{name}" for name in glue)]
    assert written(["-m", "task=glob(glue/s*)", "seed=1"]) == ["-m", "task=glue/sst2,glue/stsb", "seed=1"]
    assert written(["-m", "--config-dir", str(tmp_path), "task=glob(mine/*)"])[-1] == "task=mine/a"
    assert written(["-m", "task=glob([manual,glue/s*],exclude=glue/stsb)"])[-1] == "task=glue/sst2,manual"
    assert (
        written(["-m", "method=glob(*,exclude=[*lora*,s*,f*,q*])"])[-1]
        == "method=checkpoint,galore,grass,hydra,linear_probe,lte"
    )
    assert written(["task=glob(man*)"]) == ["task=manual"]
    assert "glue/sst2" not in written(["-m", "task=glob(*)"])[-1]
    untouched = ["trainer.batch_size=4", "data.root='/a,b'", "~experiment", "+trainer.compile=true"]
    assert written(untouched) == untouched


def test_name_holds_what_changes_the_result():
    raw = {"task": {"name": "glue/sst2"}, "model": {"name": "minilm"}, "method": {"name": "velora"}, "experiment": None}
    assert default_name(raw, ["method=velora", "data.root=/some/where", "seed=3"]) == "glue_sst2-minilm-velora"
    swept = default_name(raw, ["trainer.max_steps=3", "activations.sub_token_size=8"])
    assert swept == "glue_sst2-minilm-velora-activations.sub_token_size=8-trainer.max_steps=3"
    assert len(default_name(raw, [f"model.path=/{'x' * 300}"])) < 255
    kept_out = ["wandb.mode=disabled", "trainer.measure_memory=false", "+experiment.note=why", "objective=metrics.loss"]
    assert default_name(raw, [*kept_out, "hydra.verbose=true", "resume=never"]) == "glue_sst2-minilm-velora"


SCORES = {}


class Collecting(Callback):
    """What a sweeper sees of a job."""

    def on_job_end(self, config, job_return, **_):
        SCORES[config.seed] = job_return.return_value


@pytest.fixture
def scores(tmp_path, monkeypatch):
    """Hydra's view of `velora-train -m seed=0,1 <objective>` where the second run fails; and the exit status."""
    record = {"metrics": {"accuracy": 0.5, "f1": None, "best": {"accuracy": 0.75}}}

    def train(config):
        if config.seed == 1:
            raise RunError("it ends badly")
        return record

    def run(objective):
        SCORES.clear()
        callback = f"+hydra.callbacks.scores._target_={__name__}.Collecting"
        basic = "hydra/launcher=basic"  # all in this process
        monkeypatch.setattr(
            "sys.argv", ["velora-train", "-m", basic, "seed=0,1", objective, callback, f"runs_dir={tmp_path}"]
        )
        with pytest.raises(SystemExit) as ended:
            velora.cli.train()
        return dict(SCORES), ended.value.code

    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr("velora.run.run.train", train)
    return run


@pytest.mark.parametrize(
    ("objective", "score"),
    [("metrics.accuracy", 0.5), ("metrics.best.accuracy", 0.75), ("metrics.f1", None), ("null", None)],
)
def test_a_sweeper_gets_the_score_that_the_objective_names(scores, objective, score):
    assert scores(f"objective={objective}") == ({0: score, 1: None}, 1)


def test_an_objective_that_is_no_score(scores, capsys):
    assert scores("objective=metrics.acuracy") == ({0: None, 1: None}, 2)
    said = capsys.readouterr().err.splitlines()[0]
    assert said == (
        "velora-train: objective=metrics.acuracy is not a score of this run, whose record is written; its scores are "
        "metrics.accuracy, metrics.f1, metrics.best.accuracy"
    )


@pytest.mark.parametrize(
    "text", ["~/x", "a=b", "a,b", "a(b", "[a", "a: {b", "a b", 'a"b', "a\\", 'a\\"b', "C:\\d", "it's"]
)
def test_the_quotes_that_a_sentence_proposes_give_the_text(text):
    """What is proposed is copied into a shell, which gives Hydra one argument."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (argument,) = shlex.split(quoted(f"data.root={text}"))
    override = OverridesParser.create().parse_overrides([argument])[0]
    assert (override.key_or_group, override.value()) == ("data.root", text)
