"""The embedded vision task."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from velora.config.task import Digits
from velora.data.digits import split_indices
from velora.models.images import ImageTransform

TRANSFORM = ImageTransform(8, "bicubic", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def task(protocol="select_then_retrain") -> Digits:
    return Digits(kind="digits", name="digits", protocol=protocol)


def test_splits_are_disjoint_and_always_the_same():
    indices = split_indices()
    assert {name: len(found) for name, found in indices.items()} == {
        "train800": 800,
        "val200": 200,
        "train800val200": 1000,
        "test": 797,
    }
    assert sorted([*indices["train800"], *indices["val200"], *indices["test"]]) == list(range(1797))
    assert [*indices["train800"], *indices["val200"]] == list(indices["train800val200"])
    assert indices["train800"][:4].tolist() == [1081, 1707, 927, 713]  # another order would be another task


def test_images_and_labels_are_scikit_learns():
    data = task().load(TRANSFORM, None)
    source, order = load_digits(), split_indices()["test"]
    test = data.phases[1].validation[""]
    batch = data.collate([test[i] for i in range(797)])
    assert torch.equal(batch["labels"], torch.from_numpy(source.target[order]))
    assert set(batch["labels"].tolist()) == set(range(10))
    expected = np.round(source.images[order] * 255 / 16) / 255  # at 8 x 8 pixels nothing is resized
    for colour in range(3):
        np.testing.assert_allclose(batch["pixel_values"][:, colour].numpy(), expected, rtol=0, atol=1e-6)


def test_protocols_and_text():
    data = task().load(TRANSFORM, None)
    assert [(p.name, len(p.train), len(p.validation[""]), p.stop_at_best_of) for p in data.phases] == [
        ("select", 800, 200, None),
        ("retrain", 1000, 797, "select"),
    ]
    assert data.about["source"] == "sklearn.datasets.load_digits"
    (phase,) = task("best_on_test").load(TRANSFORM, None).phases
    assert (len(phase.train), len(phase.validation[""])) == (1000, 797)
    assert task().head(SimpleNamespace()).num_labels == 10


def test_a_text_model_is_refused():
    model = SimpleNamespace(name="llama_tiny", modalities=lambda: ("causal_lm",))
    (sentence,) = task().problems(SimpleNamespace(model=model, trainer=SimpleNamespace(eval_every="epoch")))
    assert "task=digits needs a model for image_classification, and model=llama_tiny serves causal_lm" in sentence


@pytest.mark.parametrize("size", [8, 16])
def test_grey_images_become_colour(size):
    transform = ImageTransform(size, "bicubic", (0.0,) * 3, (1.0,) * 3)
    image = transform.from_image(Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)))
    assert image.shape == (3, size, size)
    assert torch.equal(image[0], image[2])


def test_a_selection_without_evaluations_is_refused():
    model = SimpleNamespace(name="vit_tiny", modalities=lambda: ("image_classification",))
    config = SimpleNamespace(model=model, trainer=SimpleNamespace(eval_every="end"))
    (sentence,) = task("best_on_test").problems(config)
    assert sentence.startswith("task.protocol=best_on_test selects an epoch, and trainer.eval_every=end evaluates only")
    assert not list(task("last").problems(config))


def test_every_key_changes_something():
    assert set(Digits.model_fields) == {"kind", "name", "protocol"}  # the last: test_protocols_and_text
