"""Every shipped choice composes and is accepted; every published row says how far it is the published one."""

from __future__ import annotations

import pytest
from composition import EXPERIMENTS, columns
from text_helpers import composed

from velora.config.compose import conf_dir

ROWS = [name for name in EXPERIMENTS if name.startswith(("table", "vtab_", "galore", "qlora"))]
OTHERS = {
    f"{group}={file.relative_to(conf_dir() / group).with_suffix('')}": overrides
    for group, overrides in {
        "task": [], "method": [], "model": ["task=embedded"],
        "optimizer": ["method=full", "trainer.max_grad_norm=null"], "adapter": ["method=full"],
        "activations": ["method=full"], "recompute": ["method=velora"],
    }.items()
    for file in sorted((conf_dir() / group).rglob("*.yaml"))
    if file.stem not in ("causal_lm", "encoder")  # these need a model.path
}  # fmt: skip
MODELS = {
    "mmlu": "smollm2_135m",
    "alpaca_mmlu": "smollm2_135m",
    "glue": "roberta_tiny",
    "topics": "roberta_tiny",
    "digits": "vit_tiny",
    "vtab": "vit_tiny",
}  # others: a LLaMA
COLUMNS = [column for name in EXPERIMENTS for column in columns(name)]


@pytest.mark.parametrize("overrides", COLUMNS, ids=" ".join)
def test_every_experiment_composes_in_each_of_its_columns(overrides):
    config = composed(*overrides)
    assert config.experiment is not None
    assert config.experiment.name == overrides[0].partition("=")[2]


@pytest.mark.parametrize("choice", OTHERS)
def test_every_other_choice_composes(choice):
    group, _, value = choice.partition("=")
    model = [f"model={MODELS.get(value.partition('/')[0], 'llama_tiny')}"] if group == "task" else []
    chosen = getattr(composed(choice, *OTHERS[choice], *model), group)
    assert getattr(chosen, "name", value) == value


@pytest.mark.parametrize("name", ROWS)
def test_every_row_says_what_is_published_what_is_inferred_and_what_is_unknown(name):
    stated = composed(f"experiment={name}").raw["experiment"]
    assert stated["name"] == name
    assert stated["level"] == "paper"
    for key in ("published", "inferred", "unknown"):
        assert stated.get(key, "").strip(), f"{key} is empty; where there is nothing to say it says nothing"
    head = [
        line.split(":")[0].strip() for line in EXPERIMENTS[name].read_text().splitlines() if not line.startswith("#")
    ]
    assert "published" not in head or head.index("published") < head.index("unknown")  # before the settings themselves


def test_what_a_row_says_stays_out_of_the_computation_but_goes_into_the_record():
    config = composed("experiment=table2/velora", "task=glue/cola")
    assert "adapters" in config.raw["experiment"]["published"]
    assert config.experiment is not None
    assert "rank" in (config.experiment.unknown or "")
    assert config.experiment.paper["glue/cola"] == {"matthews_correlation": 0.6456, "memory_gb": 2.23}


def test_settings_differ_by_column():
    rates = {t: composed("experiment=table2/lora", f"task=glue/{t}").trainer.learning_rate for t in ("cola", "mnli")}
    assert rates == {"cola": 4e-4, "mnli": 5e-4}
    on_the_command_line = composed("experiment=table2/lora", "task=glue/cola", "trainer.learning_rate=1e-3")
    assert on_the_command_line.trainer.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("experiment=table2/lora", "task=glue/wnli"), "experiment=table2/lora has no settings for glue/wnli; it has glue/cola,"),
        (("experiment=table4/lora", "model=llama_350m"), "no settings for llama_350m; it has llama_60m, llama_130m"),
    ],
)  # fmt: skip
def test_a_column_that_is_not_in_the_table_is_refused(overrides, sentence, monkeypatch, capsys):
    from velora.cli import launch

    monkeypatch.setattr("sys.argv", ["velora-train", *overrides])
    assert launch("velora-train", lambda config: pytest.fail("it ran")) == 2
    assert sentence in capsys.readouterr().err
