"""Comparing two evaluations question by question."""

from __future__ import annotations

import json
from math import comb
from pathlib import Path

import pytest
from conftest import Cli

from velora.errors import ConfigError
from velora.report.questions import answers_file, compare, mcnemar

HEADER = {"benchmark": "mmlu", "split": "test", "prompt": "hendrycks", "num_shots": 5, "questions": 10, "digest": "x"}


def write(file: Path, right: str, subject: str = "anatomy", **header: object) -> Path:
    """One answer for each character: 1 is right, 0 wrong."""
    lines: list[dict] = [HEADER | header]
    for index, sign in enumerate(right):
        choice = 2 if sign == "1" else 0
        logs = [-1.0 if i == choice else -3.0 for i in range(4)]
        lines.append(
            {"subject": subject, "index": index, "gold": "C", "choice": "ABCD"[choice], "log_probs": logs, "shots": 5}
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.mark.parametrize(("b", "c"), [(0, 0), (3, 3), (1, 9), (10, 25), (0, 6), (40, 20)])
def test_the_exact_p_value(b: int, c: int) -> None:
    """Twice the smaller tail of a binomial with probability 1/2, and at most 1: all integers but for one division."""
    tail = sum(comb(b + c, k) for k in range(min(b, c) + 1))
    assert mcnemar(b, c) == pytest.approx(min(1.0, 2 * tail / 2 ** (b + c)), rel=1e-12)


def test_against_statsmodels() -> None:
    mcnemar_of_statsmodels = pytest.importorskip("statsmodels.stats.contingency_tables").mcnemar
    assert mcnemar(10, 25) == pytest.approx(mcnemar_of_statsmodels([[50, 10], [25, 15]], exact=True).pvalue)


def test_counts(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", "1111100000"), write(tmp_path / "b.jsonl", "1110011110")
    found = compare(a, b)
    assert (found.questions, found.right_a, found.right_b, found.only_a, found.only_b) == (10, 5, 7, 2, 4)
    assert found.difference == pytest.approx(0.2)
    differences = [int(y) - int(x) for x, y in zip("1111100000", "1110011110", strict=True)]
    variance = sum((d - 0.2) ** 2 for d in differences) / 10
    assert found.standard_error == pytest.approx((variance / 10) ** 0.5)


def test_different_evaluations_are_refused(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", "1100")
    with pytest.raises(ConfigError, match="prompt is hendrycks and lm_eval"):
        compare(a, write(tmp_path / "b.jsonl", "1100", prompt="lm_eval"))
    with pytest.raises(ConfigError, match=r"not answer the same questions \(4 and 3\)"):
        compare(a, write(tmp_path / "c.jsonl", "110"))
    with pytest.raises(ConfigError, match="not answer the same questions"):
        compare(a, write(tmp_path / "d.jsonl", "1100", subject="astronomy"))
    (tmp_path / "e.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="is no file of answers"):
        compare(a, tmp_path / "e.jsonl")
    with pytest.raises(ConfigError, match="holds no answers"):
        compare(a, write(tmp_path / "f.jsonl", ""))
    with pytest.raises(ConfigError, match="no run folder"):
        answers_file(tmp_path)


def test_a_run_stands_for_its_last_evaluation(tmp_path: Path) -> None:
    for step in (5, 40, 100):
        write(tmp_path / "run" / "mmlu" / f"step-{step}.jsonl", "1")
    assert answers_file(tmp_path / "run").name == "step-100.jsonl"


def test_the_command(cli: Cli) -> None:
    write(cli.folder / "a" / "mmlu" / "step-0.jsonl", "1111100000")
    write(cli.folder / "b" / "mmlu" / "step-9.jsonl", "1110011110")
    done = cli("--compare-questions", "a", "b", program="velora-report")
    assert done.returncode == 0, done.stderr
    assert "5 of 10 right (50.00%)" in done.stdout
    assert "only A right 2, only B right 4: McNemar's exact p = 0.688" in done.stdout
    wrong = cli("--compare-questions", "a", "nowhere", program="velora-report")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("velora-report: --compare-questions nowhere is no file of answers")
    assert not (cli.folder / "report.md").exists()
