"""The mean over a step: loss and gradient are the same however the batch is divided, and what transformers computes itself."""

from __future__ import annotations

import math
import random

import pytest
import torch
from loop_helpers import FAMILIES, LLAMA, ROBERTA, config_of, curve, train, train_in_two_processes, write_texts


@pytest.fixture(scope="module")
def regression(tmp_path_factory) -> list[str]:
    """STS-B's layout with a few sentences: an encoder whose head has one output and a squared error."""
    root = tmp_path_factory.mktemp("root")
    folder = root / "glue" / "STS-B"
    folder.mkdir(parents=True)
    header = [
        "index",
        "genre",
        "filename",
        "year",
        "old_index",
        "source1",
        "source2",
        "sentence1",
        "sentence2",
        "score",
    ]
    draw = random.Random(0)
    for name, rows in (("train", 64), ("dev", 16)):
        lines = ["\t".join(header)]
        for i in range(rows):
            first, second = (" ".join("word" * draw.randint(1, 3) for _ in range(draw.randint(1, 6))) for _ in "ab")
            lines.append("\t".join([str(i), *["x"] * 6, first, second, f"{draw.uniform(0, 5):.2f}"]))
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return [*ROBERTA, "task=glue/stsb", f"data.root={root}"]


@pytest.fixture(scope="module")
def families(regression, tmp_path_factory) -> dict[str, list[str]]:
    """Every family and every head; `padded` has texts of different length, so that micro-batches have different weights."""
    root = write_texts(tmp_path_factory.mktemp("text"))
    padded = [*LLAMA[1:], "task=c4", "task.folder=short", "task.shuffle_buffer=4", f"data.root={root}"]
    return {**FAMILIES, "padded": padded, "regression": regression}


NAMES = ["llama", "padded", "roberta", "regression", "vit"]
# VeLoRA's directions count padding, which depends on the micro-batch, so these have none
RUNS = [*((name, "full") for name in NAMES), ("llama", "velora"), ("vit", "velora")]


@pytest.mark.parametrize(("name", "method"), RUNS)
def test_loss_and_gradient_do_not_depend_on_accumulation(families, name, method, tmp_path):
    """8 x 1, 4 x 2 and 2 x 4 examples: the same mean over the step. SGD-like methods and clipping feel every factor."""
    curves = []
    for micro in (8, 4, 2):
        overrides = (f"method={method}", f"trainer.micro_batch_size={micro}")
        config = config_of(tmp_path / str(micro), *families[name], *overrides)
        train(config)
        curves.append(curve(config))
    assert len(curves[0]) == 4
    for other in curves[1:]:
        for (loss, norm), (other_loss, other_norm) in zip(curves[0], other, strict=True):
            # fp32: sums in another order, and AdamW divides by roots of small numbers in the steps after the first
            assert other_loss == pytest.approx(loss, rel=1e-4)
            assert other_norm == pytest.approx(norm, rel=1e-3)
        assert other[0] == pytest.approx(curves[0][0], rel=1e-5)


def test_loss_and_gradient_do_not_depend_on_the_number_of_processes(families, tmp_path):
    """Every family and head: the curve of one process."""
    runs = {f"{name}-{method}": [*families[name], f"method={method}"] for name, method in RUNS}
    train_in_two_processes(runs, tmp_path)
    for name in runs:
        one, two = (config_of(tmp_path / number / name, *runs[name]) for number in ("one", "two"))
        train(one)
        assert curve(two)[0] == pytest.approx(curve(one)[0], rel=1e-5), name


def test_network_says_the_same_as_transformers_own_division(tmp_path):
    """An independent path for the mean over a step: the network's own loss on all eight examples at once."""
    from velora.models.build import build_network

    config = config_of(tmp_path, *ROBERTA, "method=full", "trainer.micro_batch_size=2", "trainer.max_steps=1")
    train(config)
    tokenizer = config.model.preprocessor(config)
    data = config.task.load(tokenizer, config)
    network, _ = build_network(config, config.task.head(config), tokenizer)
    order = torch.randperm(len(data.phases[0].train), generator=torch.Generator().manual_seed(config.seed))[:8].tolist()
    loss = network.train()(**data.collate([data.phases[0].train[i] for i in order])).loss
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in network.parameters() if p.grad is not None))
    assert curve(config)[0] == pytest.approx((loss.item(), norm), rel=1e-5)
