"""Scores against their textbook formulas, written as loops in float64."""

from __future__ import annotations

import math
import random

import pytest

from velora.data.metrics import METRICS, compute

GENERATOR = random.Random(5)
LABELS = [GENERATOR.randrange(2) for _ in range(200)]
FOUND = [label if GENERATOR.random() < 0.7 else 1 - label for label in LABELS]
SCORES = [round(GENERATOR.uniform(0, 5), 1) for _ in range(200)]  # rounded: ties occur
GUESSES = [round(s + GENERATOR.gauss(0, 1), 1) for s in SCORES]


def counts() -> tuple[int, int, int, int]:
    pairs = list(zip(FOUND, LABELS, strict=True))
    return tuple(pairs.count(pair) for pair in ((1, 1), (1, 0), (0, 1), (0, 0)))  # type: ignore[return-value]


def correlation(x: list[float], y: list[float]) -> float:
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))


def mean_ranks(values: list[float]) -> list[float]:
    below = [sum(other < value for other in values) for value in values]
    equal = [sum(other == value for other in values) for value in values]
    return [b + (e + 1) / 2 for b, e in zip(below, equal, strict=True)]


def test_classes() -> None:
    true_positive, false_positive, false_negative, true_negative = counts()
    expected = {
        "accuracy": (true_positive + true_negative) / 200,
        "f1": 2 * true_positive / (2 * true_positive + false_positive + false_negative),
        "matthews_correlation": (true_positive * true_negative - false_positive * false_negative)
        / math.sqrt(
            (true_positive + false_positive)
            * (true_positive + false_negative)
            * (true_negative + false_positive)
            * (true_negative + false_negative)
        ),
    }
    # float64 on both sides; only the order of a few operations differs
    assert compute(list(expected), FOUND, LABELS) == pytest.approx(expected, rel=1e-12)


def test_correlations() -> None:
    expected = {
        "pearson": correlation(GUESSES, SCORES),
        "spearman": correlation(mean_ranks(GUESSES), mean_ranks(SCORES)),
    }
    # 200 terms summed in another order: 1e-12 is far above their rounding
    assert compute(["pearson", "spearman"], GUESSES, SCORES) == pytest.approx(expected, rel=1e-12)


def test_predictions_that_are_all_alike() -> None:
    assert compute(["f1", "matthews_correlation"], [0, 0, 0], [0, 1, 1]) == {"f1": 0.0, "matthews_correlation": 0.0}


@pytest.mark.parametrize(
    ("found", "right"),
    [
        ([1.0, 1.0, 1.0], [0.0, 2.0, 3.0]),
        ([0.0, 2.0, 3.0], [1.0, 1.0, 1.0]),
        ([1.0], [2.0]),
        ([1.0, math.nan, 3.0], [0.0, 2.0, 3.0]),
        ([1.0, math.inf, 3.0], [0.0, 2.0, 3.0]),
    ],
)
def test_a_correlation_that_is_undefined_is_not_a_number(found: list[float], right: list[float], recwarn) -> None:
    scores = compute(["pearson", "spearman"], found, right)
    assert list(scores) == ["pearson", "spearman"]
    assert all(math.isnan(score) for score in scores.values())
    assert not [w for w in recwarn if "scipy" in w.filename]


@pytest.mark.parametrize("name", METRICS)
def test_a_score_is_a_plain_number_and_leaves_no_file_behind(name: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = compute([name], [0, 1, 1, 0], [0, 1, 0, 0])
    assert list(found) == [name]
    assert type(found[name]) is float
    assert not list(tmp_path.iterdir())


def test_loss_is_a_mean_over_examples():
    """Against torch's own losses in float64; 1e-12: the same sums in another order."""
    import torch

    from velora.data.metrics import scores

    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(37, 3, generator=generator), torch.randint(3, (37,), generator=generator)
    found = scores(["accuracy"], logits.numpy(), labels.numpy())
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits.double(), labels).item(), rel=1e-12)
    assert found["accuracy"] == (logits.argmax(-1) == labels).double().mean().item()
    values, targets = torch.randn(37, 1, generator=generator), torch.randn(37, generator=generator)
    found = scores(["pearson"], values.numpy(), targets.numpy(), regression=True)
    assert found["loss"] == pytest.approx(((values[:, 0].double() - targets) ** 2).mean().item(), rel=1e-12)
