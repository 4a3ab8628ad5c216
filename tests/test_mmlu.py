"""MMLU as a task: reading, sampling, scores, what a killed evaluation leaves, and whole runs of the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli
from mmlu_helpers import bytes_tokenizer, keys, subject, write_subject
from text_helpers import stand_in

from velora.config.mmlu import CATEGORIES, SUBJECTS
from velora.data.mmlu import read_csv, read_subjects
from velora.errors import ConfigError, Diverged, Interrupted, RunError
from velora.eval.mmlu import Benchmark, load_benchmark
from velora.eval.questions import Answer, header_and_answers, scores

WORDS = 259  # of the tokenizer of bytes


# What is read


def test_the_published_counts(shared_data: Path) -> None:
    """57 subjects; 285, 1,531 and 14,042 questions (the benchmark's paper), five examples in each dev."""
    for split, expected in (("test", 14042), ("val", 1531)):
        subjects, about = read_subjects(keys(split=split), shared_data)
        assert about["questions_of_split"] == sum(len(s.questions) for s in subjects) == expected
        assert [len(s.shots) for s in subjects] == [5] * 57
    right = sum(q.gold == 0 for s in read_subjects(keys(), shared_data)[0] for q in s.questions)
    assert f"{right / 14042:.2%}" == "22.95%"  # of a model that always says A


def test_the_categories_are_the_authors() -> None:
    """Subjects a category as the benchmark's paper counts them; two that other tables have elsewhere."""
    counts = {name: list(CATEGORIES.values()).count(name) for name in set(CATEGORIES.values())}
    assert counts == {"stem": 18, "humanities": 13, "social_sciences": 12, "other": 14}
    assert (CATEGORIES["anatomy"], CATEGORIES["econometrics"]) == ("other", "social_sciences")


def test_the_categories_are_the_harness_s_but_for_anatomy() -> None:
    import yaml

    lm_eval = pytest.importorskip("lm_eval")
    folder = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
    theirs = {}
    for name in SUBJECTS:
        tag = yaml.safe_load((folder / f"mmlu_{name}.yaml").read_text())["tag"]
        theirs[name] = tag.removeprefix("mmlu_").removesuffix("_tasks")
    assert {name for name in SUBJECTS if theirs[name] != CATEGORIES[name]} == {"anatomy"}


def test_csv_as_published() -> None:
    content = b'"Say ""yes"",\nor no?",1,"a, b",None,,D\n'
    (found,) = read_csv(Path("x.csv"), content)
    assert (found.text, found.answers, found.gold) == ('Say "yes",\nor no?', ("1", "a, b", "None", ""), 3)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a,b,c\n", r"x.csv line 1 has 3 columns in place of 6"),
        (b"q,1,2,3,4,A\nq,1,2,3,4,E\n", r"x.csv line 2: the right answer 'E' is not one of A, B, C, D"),
        (b'"q,1,2,3,4,A\n', r"x.csv line \d is not csv"),
        (b"", r"x.csv has no questions"),
        (b"q,1,2,3,4,A\n\xff,1,2,3,4,A\n", r"x.csv line 2 is not UTF-8"),
    ],
)
def test_damaged_files_are_named(content: bytes, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_csv(Path("x.csv"), content)


def test_a_sample_is_the_same_in_every_run_and_draws_from_all_subjects(shared_data: Path) -> None:
    def sample(**values: Any) -> list[tuple[str, int]]:
        return [(s.name, q.row) for s in read_subjects(keys(**values), shared_data)[0] for q in s.questions]

    some = sample(questions=1000)
    assert len(set(some)) == 1000
    assert some == sample(questions=1000)
    assert some != sample(questions=1000, sample_seed=1)
    law = sum(name == "professional_law" for name, _ in some)
    assert abs(law - 1000 * 1534 / 14042) < 4 * math.sqrt(109 * 0.89)  # four standard deviations of a binomial
    assert len(sample(questions=20000)) == 14042


# Scores


def answer(name: str, index: int, gold: int, choice: int, shots: int = 5) -> Answer:
    return Answer(name, index, gold, [-1.0 if i == choice else -2.0 for i in range(4)], shots)


def test_micro_counts_questions_and_macro_subjects() -> None:
    """By hand: 3 of 4 in anatomy (other), 0 of 1 in astronomy (stem): micro 3/5, macro (3/4 + 0)/2."""
    answers = [answer("anatomy", i, 1, 1 if i < 3 else 2) for i in range(4)] + [answer("astronomy", 0, 0, 3, shots=4)]
    found = scores(answers, 5)
    assert (found["mmlu_micro"], found["mmlu_macro"]) == (0.6, 0.375)
    assert (found["mmlu_other"], found["mmlu_stem"]) == (0.75, 0.0)
    assert "mmlu_humanities" not in found
    assert found["mmlu_micro_standard_error"] == pytest.approx(math.sqrt(0.6 * 0.4 / 5))
    assert found["mmlu_macro_standard_error"] == pytest.approx(math.sqrt(0.75 * 0.25 / 4) / 2)
    assert found["mmlu_counts"] == {"questions": 5, "tied": 0, "prompts_with_fewer_shots": 1, "dropped_shots": 1}


def test_the_standard_error_of_the_whole_test_is_half_a_point() -> None:
    answers = [answer("anatomy", i, 0, 0 if i % 100 < 35 else 1) for i in range(14042)]
    assert scores(answers, 5)["mmlu_micro_standard_error"] == pytest.approx(0.004, abs=1e-4)


# An evaluation


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, number in (("astronomy", 6), ("anatomy", 5), ("sociology", 4)):
        write_subject(tmp_path, subject(name, number))
    return tmp_path


def benchmark(root: Path, **values: Any) -> Benchmark:
    chosen = keys(subjects=["anatomy", "astronomy", "sociology"], **values)
    return load_benchmark(chosen, bytes_tokenizer(), stand_in(root))


def network() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=WORDS, max_position_embeddings=2048, initializer_range=0.3, **sizes)
    return LlamaForCausalLM(config).train()


class Stopped(Exception):
    pass


def test_a_killed_evaluation_continues_with_the_next_subject(root: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    expected = benchmark(root).evaluate(network(), whole, batch_size=2)
    batches: list[int] = []

    def stop_in_the_second_subject() -> None:
        batches.append(1)
        if len(batches) == 5:  # anatomy has 5 questions: three batches
            raise Stopped

    with pytest.raises(Stopped):
        benchmark(root).evaluate(network(), cut, batch_size=2, check=stop_in_the_second_subject)
    assert [a.subject for a in header_and_answers(cut)[1]] == ["anatomy"] * 5
    batches.clear()
    found = benchmark(root).evaluate(network(), cut, batch_size=2, check=lambda: batches.append(1))
    assert len(batches) == 3 + 2  # those of astronomy and sociology
    assert found == expected
    assert cut.read_bytes() == whole.read_bytes()


def test_answers_of_another_network_or_to_other_questions_are_not_taken(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "answers.jsonl"
    benchmark(root).evaluate(network(), file, batch_size=8)
    first = file.read_bytes()
    other = network()
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight[0, 0] += 0.5
    for changed, values in ((other, {}), (network(), {"prompt": "lm_eval"}), (network(), {"num_shots": 4})):
        benchmark(root, **values).evaluate(changed, file, batch_size=8)
        assert file.read_bytes() != first
        assert "asked again" in capsys.readouterr().out
        file.write_bytes(first)
    file.write_text("what is this\n")
    benchmark(root).evaluate(network(), file, batch_size=8)
    assert file.read_bytes() == first


def test_lines_hold_what_the_network_said(root: Path, tmp_path: Path) -> None:
    file, one = tmp_path / "answers.jsonl", network()
    found = benchmark(root).evaluate(one, file, batch_size=4)
    header, *lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert {k: header[k] for k in ("benchmark", "prompt", "split", "num_shots", "questions")} == {
        "benchmark": "mmlu", "prompt": "hendrycks", "split": "test", "num_shots": 5, "questions": 15,
    }  # fmt: skip
    assert len(lines) == 15
    right = [line["gold"] == line["choice"] for line in lines]
    assert found["mmlu_micro"] == sum(right) / 15
    for line in lines:
        assert line["choice"] == "ABCD"[max(range(4), key=lambda i: line["log_probs"][i])]
    assert one.training  # as it was


def test_a_network_that_makes_no_difference_has_no_score(root: Path) -> None:
    blind = network()
    torch.nn.init.zeros_(blind.lm_head.weight)
    with pytest.raises(RunError, match=r"the same probability in all of \d+ questions.*22\.95 %.*its tokenizer"):
        benchmark(root).evaluate(blind, None, batch_size=4)


def test_figures_that_are_not_finite_have_no_score(root: Path) -> None:
    broken = network()
    torch.nn.init.constant_(broken.lm_head.weight, math.nan)
    with pytest.raises(Diverged, match="not finite"):
        benchmark(root).evaluate(broken, None, batch_size=4)


def test_a_file_that_cannot_be_written_is_a_sentence(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"answers\.jsonl cannot be written.*continues the evaluation"):
        benchmark(root).evaluate(network(), tmp_path / "file" / "answers.jsonl", batch_size=4)


def test_questions_and_network_must_fit(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"question 0 of anatomy has more than 90 tokens"):
        benchmark(root, max_length=90)
    short = stand_in(root, architecture={"model_type": "llama", "max_position_embeddings": 512})
    with pytest.raises(ConfigError, match=r"max_length=2048 is more than the 512 positions"):
        load_benchmark(keys(subjects=["anatomy"]), bytes_tokenizer(), short)
    write_subject(root, subject("anatomy", 3, num_shots=2))
    with pytest.raises(ConfigError, match=r"anatomy has 2 examples in dev"):
        benchmark(root)


# The command line

TINY = (
    "task=mmlu", "method=full", "model=llama_tiny", "name=m", "task.max_length=2048", "trainer.eval_batch_size=4",
    "model.architecture={hidden_size:32,intermediate_size:48,num_hidden_layers:2,max_position_embeddings:2048}",
    "task.subjects=[anatomy,astronomy,sociology]",
)  # fmt: skip


def test_evaluation_only(cli: Cli, root: Path) -> None:
    done = cli(*TINY, f"data.root={root}")
    assert done.returncode == 0, done.stderr
    record = cli.record("m")
    assert record["status"] == "ok"
    assert record["data"]["mmlu"]["questions"] == 15
    assert record["data"]["mmlu"]["prompt"] == "hendrycks"
    assert record["metrics"]["best"]["mmlu_micro"] == record["metrics"]["mmlu_micro"]
    assert record["metrics"]["mmlu_counts"]["questions"] == 15
    assert record["memory"]["weights_bytes"] > 0
    assert record["memory"]["gradients_bytes"] is None
    folder = cli.folder / "runs" / "m" / "seed0"
    (line,) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert line["mmlu_macro"] == record["metrics"]["mmlu_macro"]
    assert len((folder / "mmlu" / "step-0.jsonl").read_text().splitlines()) == 16
    again = cli(*TINY, f"data.root={root}")
    assert "holds this run already" in again.stdout


def test_an_interrupted_run_continues(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import velora
    import velora.eval.mmlu as module

    def run(name: str) -> dict[str, Any]:
        given = (*(o for o in TINY if not o.startswith("name=")), f"name={name}", f"data.root={root}")
        return velora.train(velora.compose(*given, f"runs_dir={tmp_path / 'runs'}"))

    expected = run("whole")["metrics"]
    real, calls = module.next_token_log_probs, []

    def stopped_in_the_third_subject(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt("stopped by SIGTERM")
        return real(*args, **options)

    monkeypatch.setattr(module, "next_token_log_probs", stopped_in_the_third_subject)
    with pytest.raises(Interrupted, match="stopped by SIGTERM; the same command continues it"):
        run("cut")
    assert run("cut")["metrics"] == expected
    assert len(calls) == 4  # only the third subject was asked again
    assert "11 questions were answered before" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["velora", "qlora_velora"])
def test_every_form_of_the_weights_is_evaluated(cli: Cli, root: Path, method: str) -> None:
    """Adapters begin at zero and directions change no forward: the score is that of the plain network, but for four bits."""
    pytest.importorskip("bitsandbytes", minversion="0.50")
    done = cli(*(o for o in TINY if not o.startswith("method=")), f"method={method}", f"data.root={root}")
    assert done.returncode == 0, done.stderr
    plain = cli(*TINY[:3], "name=plain", *TINY[4:], f"data.root={root}")
    assert plain.returncode == 0, plain.stderr
    lines = [
        (cli.folder / "runs" / name / "seed0" / "mmlu" / "step-0.jsonl").read_text().splitlines()[1:]
        for name in ("m", "plain")
    ]
    found, expected = ([json.loads(line)["log_probs"] for line in side] for side in lines)
    tolerance = 0.5 if method.startswith("qlora") else 1e-5  # four bits; float32 sums in another order
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=tolerance, rtol=0)
    assert (found == expected) != method.startswith("qlora")


def test_there_is_no_training_memory_to_count(cli: Cli, root: Path) -> None:
    done = cli(*TINY, f"data.root={root}", program="velora-memory")
    assert (done.returncode, done.stdout) == (2, "")
    assert "trainer.max_steps=0: task=mmlu trains nothing here" in done.stderr


def test_a_sample_is_stated(cli: Cli, root: Path) -> None:
    done = cli(*TINY, f"data.root={root}", "task.questions=7", "method=lora")
    assert done.returncode == 0, done.stderr
    assert cli.record("m")["data"]["mmlu"]["sample"] == "7 of 15 questions, drawn with seed 0"
    assert "mmlu_micro" in done.stdout
