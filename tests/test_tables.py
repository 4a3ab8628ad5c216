"""Whole tables: what they run, in which order, and what a level stands for. The runs are stand-ins (sweep_helpers.py)."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from composition import EXPERIMENTS
from sweep_helpers import StandIns, make_stand_ins

import velora
from velora.config.compose import conf_dir
from velora.config.level import LEVELS, as_override, judge_of, read_table, settings_of
from velora.errors import ConfigError
from velora.tables.plan import Asked, plan
from velora.tables.run import read_arguments

FOLDERS = [conf_dir()]
TABLES = sorted(file.stem for file in (conf_dir() / "table").glob("*.yaml"))
AT_LEVELS = [(table, level) for table in TABLES for level in LEVELS if read_table(table, FOLDERS).at(level)]


# The files


@pytest.mark.parametrize(("table", "level"), AT_LEVELS)
def test_every_cell_composes_and_says_its_level(table, level):
    cells, _ = plan(Asked([table], level), FOLDERS)
    for cell in cells if len(cells) <= 16 else cells[:: len(cells) // 8]:
        config = velora.compose(*cell.first()[-1])
        assert config.experiment is not None
        assert config.experiment.name == cell.experiment
        assert config.experiment.level == level
        assert config.name.startswith(f"{level}/{table}/" if level != "paper" else f"{table}/")
        assert config.experiment.searched == list(
            read_table(table, FOLDERS).at(level).row(cell.experiment.partition("/")[2]).search
        )


@pytest.mark.parametrize("table", TABLES)
def test_its_rows_are_the_files_of_its_folder(table):
    stated = read_table(table, FOLDERS)
    named = {row for level in stated.levels for row in stated.rows_at(level)} | set(stated.rows)
    assert {f"{table}/{row}" for row in named} == {name for name in EXPERIMENTS if name.startswith(f"{table}/")}


@pytest.mark.parametrize("table", [table for table, level in AT_LEVELS if level == "paper"])
def test_its_columns_are_those_that_the_paper_prints(table):
    """As published: the product of its columns is what the rows print, no more and no less."""
    stated = read_table(table, FOLDERS)
    for row in stated.rows:
        printed = set(velora.compose(f"experiment={table}/{row}").experiment.paper)
        cells, _ = plan(Asked([table], "paper", rows=[f"{table}/{row}"]), FOLDERS)
        columns = {
            " ".join(o.partition("=")[2] for o in cell.overrides if o.startswith(("task=", "model="))) for cell in cells
        }
        assert columns == printed


def test_published_settings_are_those_of_the_rows_alone():
    for table in TABLES:
        at = read_table(table, FOLDERS).at("paper")
        assert at is None or (at.settings == {} and not isinstance(at.rows, dict))


def test_memory_of_table_4_is_of_batch_1():
    config = velora.compose("experiment=table4/galore", "level=memory", "model=llama_130m")
    assert (config.trainer.batch_size, config.trainer.precision, config.weights.dtype) == (1, "fp32", "fp32")
    assert config.optimizer.rank == 256
    assert config.has_only_shapes


# A level of one run


def test_a_level_stands_for_settings_that_the_user_may_change():
    small = velora.compose("experiment=table2/lora", "level=small", "task=glue/cola")
    assert (small.model.name, small.trainer.max_steps, small.experiment.level) == ("minilm", 60, "small")
    mine = velora.compose(
        "experiment=table2/lora", "level=small", "task=glue/cola", "trainer.max_steps=7", "model=roberta_tiny"
    )
    assert (mine.model.name, mine.trainer.max_steps, mine.task.max_length) == ("roberta_tiny", 7, small.task.max_length)
    assert small.name == "small/table2/lora-glue_cola-minilm-lora"
    assert mine.name == "small/table2/lora-glue_cola-roberta_tiny-lora-trainer.max_steps=7"


def test_a_level_changes_nothing_but_what_it_lists():
    without = velora.compose("experiment=table2/lora", "task=glue/cola").raw
    listed = {o.partition("=")[0].lstrip("+") for o in settings_of("table2/lora", "small", FOLDERS)}
    small = velora.compose("experiment=table2/lora", "level=small", "task=glue/cola").raw
    changed = velora.config.run.differing_keys(without, small)
    assert {key for key in changed if key not in listed and not key.startswith("model.")} == set()
    assert {"trainer.max_steps", "task.max_length", "model.name"} <= changed


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("level=small",), "level=small is that of a table's row; give experiment=table2/velora, or -m table=table2"),
        (("table=table2",), "table=table2: a table is many runs; velora-train -m table=table2 runs them"),
        (("experiment=table2/velora", "level=tiny"), "level=tiny is not known; it is one of paper, memory, small"),
        (("experiment=vtab_ssf", "level=small"), "experiment=vtab_ssf has no such level; it has paper"),
        (("experiment=table5a/qlora", "level=small"), "experiment=table5a/qlora has no such level; it has paper"),
    ],
)
def test_a_level_that_is_not_there(overrides, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        velora.compose(*overrides)


def test_values_in_the_grammar_of_the_command_line():
    values = [True, None, 1e-3, 3, "vtab/cifar", "a b", "${x}", [1, "c"], {"value": 16, "down": None}]
    written = [as_override(value) for value in values]
    assert written == ["true", "null", "0.001", "3", "vtab/cifar", '"a b"', '"${x}"', "[1,c]", "{value:16,down:null}"]


def test_what_a_search_goes_by():
    printed = {"paper": {"glue/cola": {"memory_gb": 1.0, "matthews_correlation": 0.5}, "glue/rte": {"accuracy": 0.5}}}
    assert judge_of(printed, "glue/rte", "minilm").score == "accuracy"
    assert judge_of(printed, "topics", "minilm").score == "matthews_correlation"  # of any column
    assert judge_of(printed, "glue/rte", "minilm").best is max
    assert judge_of({**printed, "judged_by": "perplexity"}, "glue/rte", "minilm").best is min
    with pytest.raises(ConfigError, match="prints no score to search by"):
        judge_of({"name": "table7_c4/full", "paper": {"c4": {"memory_gb": 1.0}}}, "c4", "llama_60m")


# A whole table


@pytest.fixture
def sweep(tmp_path, monkeypatch, capsys) -> StandIns:
    """With a table of the user's own, whose two rows are searched over three rates and run with two seeds."""
    rows = {row: {"search": {"trainer.learning_rate": [1e-3, 2e-3, 4e-3]}} for row in ("full", "velora")}
    small = {
        "columns": {"task": ["embedded", "manual"]},
        "seeds": [0, 1],
        "rows": rows,
        "settings": {"trainer.max_steps": 3},
    }
    content = {
        "title": "mine",
        "rows": ["full", "velora"],
        "columns": {"task": ["embedded"]},
        "levels": {"small": small},
    }
    for folder in ("table", "experiment/mine"):
        (tmp_path / "conf" / folder).mkdir(parents=True)
    (tmp_path / "conf/table/mine.yaml").write_text(yaml.safe_dump(content))
    for row in rows:
        experiment = {"name": f"mine/{row}", "table": "mine", "row": row, "paper": {"embedded": {"accuracy": 0.7}}}
        body = {"defaults": [{"override /method": row}, "_self_"], "experiment": experiment}
        (tmp_path / f"conf/experiment/mine/{row}.yaml").write_text("# @package _global_\n" + yaml.safe_dump(body))
    return make_stand_ins(tmp_path, monkeypatch, capsys)


def runs(sweep: StandIns) -> list[tuple[str, ...]]:
    """Row, task, rate and seed of each run of the sweep, in order."""
    found = []
    for job in sweep.state().jobs:
        given = dict(o.split("=", 1) for o in job.overrides)
        found.append((given["experiment"], given["task"], given["trainer.learning_rate"], given["seed"]))
    return found


def test_the_other_seeds_run_at_the_best_rate_of_the_first(sweep):
    scores = {
        ("mine/full", "embedded"): "0.002",
        ("mine/full", "manual"): "0.004",
        ("mine/velora", "embedded"): "0.001",
    }
    sweep.score_of = lambda c: (
        0.9 if f"{c.trainer.learning_rate:g}" == scores.get((c.experiment.name, c.task.name)) else 0.5
    )
    sweep.config_dir = sweep.folder / "conf"
    assert sweep.run("table=mine", "level=small", "--config-dir", str(sweep.folder / "conf")) == 0, sweep.said
    found = runs(sweep)
    assert len(found) == 2 * 2 * (3 + 1)
    assert [run[3] for run in found] == ["0"] * 12 + ["1"] * 4
    assert found[12:] == [
        ("mine/full", "embedded", "0.002", "1"), ("mine/full", "manual", "0.004", "1"),
        ("mine/velora", "embedded", "0.001", "1"), ("mine/velora", "manual", "0.001", "1"),
    ]  # fmt: skip
    assert "velora-report runs/small/mine" in sweep.printed
    started = len(sweep.started)
    assert sweep.run("table=mine", "level=small", "--config-dir", str(sweep.folder / "conf")) == 0
    assert (started, sweep.started) == (16, [])  # the same command again has nothing to do


def test_what_the_user_narrows_and_sets(sweep):
    sweep.config_dir = sweep.folder / "conf"
    own = ("--config-dir", str(sweep.folder / "conf"))
    given = (
        "table=mine",
        "level=small",
        "task=manual",
        "experiment=mine/velora",
        "seed=3",
        "trainer.learning_rate=5e-3",
    )
    assert sweep.run(*given, *own) == 0, sweep.said
    assert runs(sweep) == [("mine/velora", "manual", "5e-3", "3")]
    record = json.loads(next((sweep.folder / "runs/small/mine").rglob("result.json")).read_text())
    assert record["config"]["trainer"]["max_steps"] == 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("table=table22",), "table=table22 is not known"),
        (("table=table2", "level=tiny"), "level=tiny is not known"),
        (("table=table5c", "level=memory"), "table=table5c has no level memory; it has paper, small"),
        (("table=table2", "level=small", "task=glue/rte"), "glue/rte is no task of table2 at level small; it is one of glue/cola,"),
        (("table=table2", "experiment=table2/ssf"), "ssf is no experiment of table2 at level paper; it is one of full,"),
        (("table=table2", "seed=a"), "seed=a: give seeds of a table as a list of numbers"),
        (("table=table2", "trainer.max_steps=1,2"), "trainer.max_steps=1,2: a table has rows, columns and seeds"),
    ],
)  # fmt: skip
def test_what_cannot_be_run(sweep, arguments, sentence):
    assert sweep.run(*arguments) == 2
    assert sentence in sweep.said
    assert not (sweep.folder / "runs").exists()


def test_a_table_is_many_runs(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["velora-train", "table=table2"])
    with pytest.raises(SystemExit) as ended:
        velora.cli.train()
    assert ended.value.code == 2
    assert "table=table2 is many runs: add -m" in capsys.readouterr().err


def test_arguments_of_the_sweep_are_no_part_of_its_runs():
    asked, sweep_keys = read_arguments(["table=a,b", "level=small", "sweep.jobs=2", "seed=1,2", "data.root=x"])
    assert (asked.tables, asked.level, asked.seeds, asked.overrides) == (["a", "b"], "small", [1, 2], ("data.root=x",))
    assert sweep_keys == ["sweep.jobs=2"]


def test_a_file_that_is_wrong_says_where(tmp_path):
    (tmp_path / "table").mkdir()
    (tmp_path / "table/mine.yaml").write_text("title: x\nrows: [full]\ncolumns: {task: [manual]}\nlevels: {tiny: {}}\n")
    with pytest.raises(ConfigError, match="tiny"):
        read_table("mine", [tmp_path])
