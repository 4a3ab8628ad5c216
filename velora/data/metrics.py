"""Scores as `evaluate.Metric` classes that compute here, with scikit-learn and scipy: nothing is downloaded for a metric.

Each takes `predictions` and `references`: class numbers, or real numbers for the correlations. `compute(...)` returns a
dictionary with one entry, named as the metric.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.special import log_softmax


class LocalMetric(evaluate.Metric):
    """A metric that keeps what it is given in memory; the folder that the library makes for each metric is removed at once."""

    dtype = "int64"

    def __init__(self, **options: Any) -> None:
        with tempfile.TemporaryDirectory(prefix="velora-metric-") as scratch:
            super().__init__(keep_in_memory=True, cache_dir=scratch, **options)

    def _info(self) -> evaluate.MetricInfo:
        value = datasets.Value(self.dtype)
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="",
            inputs_description="predictions and references: one number per example",
            features=datasets.Features({"predictions": value, "references": value}),
        )


class Accuracy(LocalMetric):
    """The share of examples whose class was found."""

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        from sklearn.metrics import accuracy_score

        return {"accuracy": float(accuracy_score(references, predictions))}


class F1(LocalMetric):
    """F1 of class 1, as GLUE scores MRPC and QQP; 0 where nothing was predicted positive."""

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        from sklearn.metrics import f1_score

        return {"f1": float(f1_score(references, predictions, zero_division=0.0))}


class MatthewsCorrelation(LocalMetric):
    """Matthews' correlation, as GLUE scores CoLA; 0 where all predictions are alike."""

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        from sklearn.metrics import matthews_corrcoef

        return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}


class Pearson(LocalMetric):
    """Pearson's correlation of real numbers; not a number where it is undefined."""

    dtype = "float64"

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        from scipy.stats import pearsonr

        return {"pearson": _correlation(pearsonr, predictions, references)}


class Spearman(LocalMetric):
    """Spearman's rank correlation; ties share their mean rank; not a number where it is undefined."""

    dtype = "float64"

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        from scipy.stats import spearmanr

        return {"spearman": _correlation(spearmanr, predictions, references)}


def _correlation(function: Any, predictions: Sequence[float], references: Sequence[float]) -> float:
    """A correlation of scipy's; not a number where one side is constant, has one example or is not finite."""
    sides = np.asarray(predictions, dtype=np.float64), np.asarray(references, dtype=np.float64)
    if any(len(side) < 2 or not np.isfinite(side).all() or (side == side[0]).all() for side in sides):
        return float("nan")
    return float(function(*sides)[0])


METRICS: dict[str, type[LocalMetric]] = {
    "accuracy": Accuracy,
    "f1": F1,
    "matthews_correlation": MatthewsCorrelation,
    "pearson": Pearson,
    "spearman": Spearman,
}


def compute(names: Sequence[str], predictions: Any, references: Any) -> dict[str, float]:
    """The named scores of one-dimensional arrays of predictions and references."""
    scores: dict[str, float] = {}
    for name in names:
        found = METRICS[name]().compute(predictions=predictions, references=references)
        assert found is not None
        scores.update(found)
    return scores


def scores(names: Sequence[str], outputs: Any, labels: Any, regression: bool = False) -> dict[str, float]:
    """The named scores and `loss`, out of a network's outputs (E x classes, or E x 1 for a regression) and E labels.

    `loss` is the mean over the examples (cross-entropy, or squared error), in float64: Trainer's own figure is a mean over
    batches, in which the examples of a short last batch count for more.
    """
    outputs = np.asarray(outputs, dtype=np.float64)
    if regression:
        predictions = outputs[:, 0]
        losses = (predictions - labels) ** 2
    else:
        predictions = outputs.argmax(axis=-1)
        losses = -log_softmax(outputs, axis=-1)[np.arange(len(labels)), labels]
    return {"loss": float(losses.mean()), **compute(names, predictions, labels)}
