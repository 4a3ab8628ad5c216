"""Scores of examples, and how much there is in a batch: what its loss is a mean over, what its speed is counted in.

Shapes: B examples in a batch, L tokens in a sequence, E examples of an evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from scipy.special import log_softmax
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor

Batch = dict[str, Any]


def num_examples(batch: Batch) -> int:
    """B: a loss of one label each, and the speed of images."""
    return len(batch["labels"])


def num_predicted_tokens(batch: Batch) -> Tensor:
    """Labels (B, L) that a language model's loss reads: position i predicts token i + 1, and -100 is no label."""
    return (batch["labels"][:, 1:] != -100).sum()


def num_tokens(batch: Batch) -> Tensor | int:
    """Tokens that are not padding; without a mask there is none."""
    return batch["attention_mask"].sum() if "attention_mask" in batch else batch["input_ids"].numel()


def correlation(function: Callable[..., Any], labels: Any, predictions: Any) -> float:
    """A correlation of scipy's; not a number where one side is constant, has one example or is not finite."""
    sides = [np.asarray(side, dtype=np.float64) for side in (predictions, labels)]
    if any(len(side) < 2 or not np.isfinite(side).all() or (side == side[0]).all() for side in sides):
        return float("nan")
    return function(*sides)[0]


# Each of labels and predictions, E class numbers or, for the correlations, E real numbers.
METRICS: dict[str, Callable[[Any, Any], float]] = {
    "accuracy": accuracy_score,
    "f1": partial(f1_score, zero_division=0.0),  # of class 1, as GLUE scores MRPC and QQP; 0 where none was predicted
    "matthews_correlation": matthews_corrcoef,  # 0 where all predictions are alike
    "pearson": partial(correlation, pearsonr),
    "spearman": partial(correlation, spearmanr),  # ties share their mean rank
}


def compute(names: Sequence[str], predictions: Any, labels: Any) -> dict[str, float]:
    """The named scores of one-dimensional arrays of predictions and labels."""
    return {name: float(METRICS[name](labels, predictions)) for name in names}


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
