"""VTAB-1k from image lists: reading, splits, protocols, the record's text, and bad lists."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY
from PIL import Image

from velora.config.task import VTAB
from velora.data.images import DecodedImages, ListedImages
from velora.errors import ConfigError
from velora.models.images import ImageTransform

TRANSFORM = ImageTransform(8, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
NAMES = ("train800", "val200", "train800val200", "test")
SIZES = {"train800": 6, "val200": 3, "train800val200": 9, "test": 4}


def task(**changes) -> VTAB:
    keys = {
        "kind": "vtab", "name": "vtab/dtd", "folder": "dtd_subset", "group": "natural", "num_classes": 47,
        "protocol": "select_then_retrain", "keep_decoded": 100, "hub": "somebody/VTAB:vtab.zip",
    }  # fmt: skip
    return VTAB.model_validate(keys | changes)


def config(root: Path | None, eval_every="epoch"):
    model = SimpleNamespace(name="vit_tiny", image_size=8, modalities=lambda: ("image_classification",))
    return SimpleNamespace(data=SimpleNamespace(root=root), model=model, trainer=SimpleNamespace(eval_every=eval_every))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data folder with one task of 3 classes: image number i is all of colour 10 i and has label i modulo 3."""
    folder = tmp_path / "vtab" / "dtd_subset"
    (folder / "images").mkdir(parents=True)
    lines = []
    for i in range(13):
        name = f"images/a picture {i}.png"  # names may hold blanks
        Image.fromarray(np.full((5, 7, 3), 10 * i, dtype=np.uint8)).save(folder / name)
        lines.append(f"{name} {i % 3}\n")
    (folder / "train800.txt").write_text("".join(lines[:6]))
    (folder / "val200.txt").write_text("".join(lines[6:9]))
    (folder / "train800val200.txt").write_text("".join(lines[:9]))
    (folder / "test.txt").write_text("".join(lines[9:]))
    (folder / "classes.txt").write_text("0 banded\n1 blotchy\n2 braided\n")
    return tmp_path


def test_splits_labels_and_pixels(root):
    data = task().load(TRANSFORM, config(root))
    assert [
        (p.name, len(p.train), list(p.validation), len(p.validation[""]), p.stop_at_best_of) for p in data.phases
    ] == [
        ("select", 6, [""], 3, None),
        ("retrain", 9, [""], 4, "select"),
    ]
    batch = data.collate([data.phases[1].validation[""][i] for i in range(4)])
    assert batch["labels"].tolist() == [0, 1, 2, 0]
    assert batch["pixel_values"].shape == (4, 3, 8, 8)
    expected = torch.tensor([(10 * i / 255 - 0.5) / 0.5 for i in range(9, 13)])
    torch.testing.assert_close(batch["pixel_values"].mean((1, 2, 3)), expected, rtol=0, atol=1e-6)
    shapes = task().batch_shapes(4, config(root))
    assert {k: (tuple(v.shape), str(v.dtype).removeprefix("torch.")) for k, v in batch.items()} == shapes


@pytest.mark.parametrize("protocol", ["best_on_test", "last"])
def test_other_protocols_train_on_all_at_once(root, protocol):
    data = task(protocol=protocol).load(TRANSFORM, config(root))
    (phase,) = data.phases
    assert (len(phase.train), len(phase.validation[""])) == (9, 4)
    assert phase.only_at_end == (protocol == "last")
    assert ("TEST set" in data.about["protocol_means"]) == (protocol == "best_on_test")
    assert set(data.about["split_files"]) == {"train800val200.txt", "test.txt"}


def test_decoded_once_or_at_each_use(root):
    kept = task().load(TRANSFORM, config(root)).phases[0].train
    lazy = task(keep_decoded=3).load(TRANSFORM, config(root)).phases[0]
    assert isinstance(kept, DecodedImages)
    assert isinstance(lazy.train, ListedImages)
    assert isinstance(lazy.validation[""], DecodedImages)  # three images
    for one, other in zip(kept, (lazy.train[i] for i in range(6)), strict=False):
        assert torch.equal(one[0], other[0])
        assert one[1] == other[1]


def test_what_the_record_says(root):
    about = task().load(TRANSFORM, config(root)).about
    assert (about["folder"], about["group"], about["num_classes"], about["official_num_classes"]) == (
        "dtd_subset",
        "natural",
        3,
        47,
    )
    for name in NAMES:
        content = (root / "vtab" / "dtd_subset" / f"{name}.txt").read_bytes()
        assert about["split_files"][f"{name}.txt"] == {
            "num_images": SIZES[name],
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    assert about["preprocessing"]["mean"] == [0.5, 0.5, 0.5]


def test_number_of_classes(root):
    assert task().head(config(root)).num_labels == 3
    assert task().head(config(None)).num_labels == 47
    (root / "vtab" / "dtd_subset" / "classes.txt").unlink()
    assert task().head(config(root)).num_labels == 47
    (root / "vtab" / "dtd_subset" / "classes.txt").write_text("\n")
    with pytest.raises(ConfigError, match=r"classes\.txt is empty"):
        task().head(config(root))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"0 a\n1 b\n2 c\n", 3), (b"a\nb\n", 2), (b"\xef\xbb\xbf00 a\r\n01 b\r\n", 2),
        (b"0 caf\xe9\n", r"classes\.txt is not UTF-8 text \(invalid continuation byte at byte 5\): save it as UTF-8"),
        (b"0 a\n1 b\n1 c\n", r"classes\.txt must number its 3 classes 0 to 2, each once"),
        (b"1 a\n2 b\n", r"classes\.txt must number its 2 classes 0 to 1, each once"),
        (b"0 a\n" + b"9" * 5000 + b" b\n", r"classes\.txt must number its 2 classes 0 to 1"),
    ],
)  # fmt: skip
def test_classes(root, content, found):
    (root / "vtab" / "dtd_subset" / "classes.txt").write_bytes(content)
    if isinstance(found, int):
        assert task().head(config(root)).num_labels == found
    else:
        with pytest.raises(ConfigError, match=found):
            task().head(config(root))


def test_top1_over_all_examples(root):
    metrics = task().load(TRANSFORM, config(root)).metrics
    logits = np.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [1.0, 0.0, 0.5], [0.0, 0.1, 0.2]])
    found = metrics(logits, np.array([0, 1, 2, 2]))
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert found == pytest.approx({"accuracy": 0.75, "loss": -np.log(chances[[0, 1, 2, 3], [0, 1, 2, 2]]).mean()})


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("test.txt", None, r"test\.txt is missing: each line of it must be <relative image path> <label>"),
        ("test.txt", "", r"test\.txt is empty"),
        ("val200.txt", "images/a picture 1.png\n", r"val200\.txt, line 1: .* is not <relative image path> <label>"),
        ("val200.txt", "images/a picture 1.png one\n", r"val200\.txt, line 1: .* is not <relative image path> <label>"),
        ("val200.txt", "images/a picture 1.png -1\n", r"val200\.txt, line 1: .* is not <relative image path> <label>"),
        ("train800.txt", "images/a picture 1.png 0\n\nimages/a picture 2.png 3\n",
         r"train800\.txt, line 3: label 3 is out of range, the task has 3 classes \(0 to 2\)"),
        ("train800.txt", "images/nothing.png 0\n", r"train800\.txt, line 1: the image images/nothing\.png does not exist"),
    ],
)  # fmt: skip
def test_bad_lists_are_refused(root, file, content, sentence):
    path = root / "vtab" / "dtd_subset" / file
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ConfigError, match=sentence):
        task().load(TRANSFORM, config(root))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b"images/a picture 1.png +1", r"b?'images/a picture 1\.png \+1' is not <relative image path> <label>"),
        (b"images/a picture 1.png 1.0", r"is not <relative image path> <label>"),
        ("images/a picture 1.png ٣".encode(), r"is not <relative image path> <label>"),
        (b"images/a picture 1.png", r"is not <relative image path> <label>"),
        (b"1", r"'1' is not <relative image path> <label>"),
        (b" 1", r"' 1' is not <relative image path> <label>"),
        (b"images/a picture 1.png " + b"9" * 5000, r"label 9{200} is out of range, the task has 3 classes \(0 to 2\)$"),
        (b"../dtd_subset/images/a picture 1.png 1", r"image \.\./dtd_subset/images/a picture 1\.png is not below .*/dtd_subset: "),
        (b"/etc/passwd 1", r"the image /etc/passwd is not below .*/dtd_subset: give a path relative to that folder"),
        (b"images 1", r"the image images does not exist in "),  # a folder
        (b"a" * 300 + b" 1", r"the image a{200} does not exist in "),
        (b"images/a\0b.png 1", r"does not exist in "),
        (b"images/a picture 0.png 1", r"label 1 contradicts an earlier line, where this image has label 0"),
    ],
)  # fmt: skip
def test_bad_lines_are_refused(root, line, sentence):
    (root / "vtab" / "dtd_subset" / "val200.txt").write_bytes(b"images/a picture 0.png 0\n" + line + b"\n")
    with pytest.raises(ConfigError, match=rf"^[^\n]*/val200\.txt, line 2: [^\n]*{sentence}"):
        task().load(TRANSFORM, config(root))


@pytest.mark.parametrize("content", [b"images/caf\xe9.png 0\n", "images/a picture 1.png 0\n".encode("utf-16")])
def test_a_list_that_is_not_utf8_is_refused(root, content):
    (root / "vtab" / "dtd_subset" / "val200.txt").write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"val200\.txt is not UTF-8 text \(invalid .* byte at byte \d+\): save it as UTF-8$"
    ):
        task().load(TRANSFORM, config(root))


@pytest.mark.parametrize(
    "form",
    [b"\xef\xbb\xbf%s 1\n%s 2\n", b"%s 1\r\n%s 2\r\n", b"%s\t1\n%s\t 2 \n", b"%s   1\n\n   \n%s 02", b"./%s 1\r%s 2"],
)
def test_forms_of_a_list_that_are_read(root, form):
    one, two = b"images/a picture 1.png", b"images/a picture 2.png"
    (root / "vtab" / "dtd_subset" / "test.txt").write_bytes(form % (one, two))
    test = task().load(TRANSFORM, config(root)).phases[1].validation[""]
    assert [(int(image[0, 0, 0]), label) for image, label in test] == [(10, 1), (20, 2)]


def test_names_beyond_ascii_are_read(root):
    folder = root / "vtab" / "dtd_subset"
    (folder / "images" / "a picture 1.png").rename(folder / "images" / "caf\u00e9 \u2028.png")
    for name in NAMES:  # U+2028 is no end of a line
        text = (folder / f"{name}.txt").read_text().replace("a picture 1.png", "caf\u00e9 \u2028.png")
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    assert len(task().load(TRANSFORM, config(root)).phases[0].train) == 6


def test_what_may_not_be_meant_is_said_once(root, capsys):
    folder = root / "vtab" / "dtd_subset"
    data = task(num_classes=3).load(TRANSFORM, config(root))
    assert data.about["notes"] == []
    assert capsys.readouterr().out == ""
    with (folder / "test.txt").open("a") as stream:
        stream.write("images/a picture 0.png 0\nimages/a picture 0.png 0\n")
    (folder / "classes.txt").write_text("0 a\n1 b\n2 c\n3 d\n4 e\n")
    notes = [
        "lines of test.txt that list an image again: 1",
        "2 of the 6 images of test.txt stand in train800val200.txt too: they are trained on",
        "2 of the 5 classes have no image in train800val200.txt",
        "the 5 classes of classes.txt count, not task.num_classes=47",
    ]
    assert task().load(TRANSFORM, config(root)).about["notes"] == notes
    assert capsys.readouterr().out.splitlines() == [f"note: {folder}: {text}" for text in notes]


@pytest.mark.parametrize("keep_decoded", [0, 100])
def test_a_file_that_is_no_image_is_refused(root, keep_decoded):
    (root / "vtab" / "dtd_subset" / "images" / "a picture 2.png").write_text("no image")

    def use():
        return task(keep_decoded=keep_decoded).load(TRANSFORM, config(root)).phases[0].train[2]

    with pytest.raises(ConfigError, match=r"a picture 2\.png is not a readable image"):
        use()


def test_a_bad_image_in_a_loading_process_ends_the_run_with_one_sentence(root, cli):
    image = root / "vtab" / "dtd_subset" / "images" / "a picture 2.png"
    image.write_bytes(image.read_bytes()[:50])
    done = cli(
        "task=vtab/dtd", "task.folder=dtd_subset", "task.keep_decoded=0", "model=vit_tiny", f"data.root={root}", "name=bad",
        "trainer.num_workers=1", "trainer.num_epochs=1", "trainer.warmup_ratio=0", "trainer.batch_size=6",
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    record = cli.record("bad")
    assert record["status"] == "failed"
    assert record["error"].startswith(f"{image} is not a readable image (")
    assert "\n" not in record["error"]
    assert f"velora-train: {record['error']}\n" in done.stderr


def test_problems_of_the_configuration(root):
    assert not list(task().problems(config(root)))
    (sentence,) = task(folder="svhn").problems(config(root))
    assert "task.folder=svhn: " in sentence
    assert sentence.endswith("there are dtd_subset")
    for folder in ("", "..", "dtd_subset/../../..", "/etc"):
        (sentence,) = task(folder=folder).problems(config(root))
        assert sentence == f"task.folder={folder!r} is not the name of a folder below data.root/vtab"
    for hub in ("", "somebody/VTAB", "somebody/VTAB:", ":vtab.zip"):
        (sentence,) = task(hub=hub).problems(config(root))
        assert sentence == f"task.hub={hub} is not <dataset repository>:<zip file>"
    (root / "empty").mkdir()
    (sentence,) = task().problems(config(root / "empty"))
    assert sentence.endswith("has no task folders")


@pytest.mark.parametrize("protocol", ["select_then_retrain", "best_on_test"])
def test_a_selection_without_evaluations_is_refused(root, protocol):
    (sentence,) = task(protocol=protocol).problems(config(root, eval_every="end"))
    assert sentence == (
        f"task.protocol={protocol} selects an epoch, and trainer.eval_every=end evaluates only the last one; "
        "give trainer.eval_every=epoch, or task.protocol=last"
    )
    assert not list(task(protocol=protocol).problems(config(root, eval_every=0.1)))
    assert not list(task(protocol="last").problems(config(root, eval_every="end")))


def test_every_key_changes_something(root, monkeypatch, capsys):
    """A key that this does not name is new: show here what it changes."""
    folder = root / "vtab" / "dtd_subset"
    shutil.copytree(folder, root / "vtab" / "other")
    (root / "vtab" / "other" / "test.txt").write_text("images/a picture 0.png 0\n")

    def about(**changes):
        return task(**changes).load(TRANSFORM, config(root)).about

    assert about(folder="other")["split_files"]["test.txt"]["num_images"] == 1
    assert about(group="structured")["group"] == "structured"  # the report's means go by it
    capsys.readouterr()
    about(num_classes=5)
    assert "the 3 classes of classes.txt count, not task.num_classes=5" in capsys.readouterr().out
    assert task(num_classes=5).head(config(None)).num_labels == 5
    assert about(protocol="last")["protocol"] == "last"
    assert isinstance(task(keep_decoded=0).load(TRANSFORM, config(root)).phases[0].train, ListedImages)
    asked = []

    def load(what, remedy, function):
        asked.append(what)
        return str(root / "vtab.zip")

    monkeypatch.setattr("velora.models.hub.load", load)
    monkeypatch.setattr("velora.data.vtab.unpack_folder", lambda archive, name: folder)
    assert task(hub="other/VTAB:all.zip").load(TRANSFORM, config(None)).about["source"] == "other/VTAB:all.zip"
    assert asked == ["the archive other/VTAB:all.zip (about 5 GB)"]
    named_elsewhere = {"kind", "name"}  # the class itself; the run's folder and record
    shown = {"folder", "group", "num_classes", "protocol", "keep_decoded", "hub"}
    assert set(VTAB.model_fields) == named_elsewhere | shown


def test_nineteen_tasks():
    folder = REPOSITORY / "conf" / "task" / "vtab"
    found = {file.stem: yaml.safe_load(file.read_text())["task"] for file in folder.glob("*.yaml")}
    assert all(keys["name"] == f"vtab/{stem}" and keys["folder"] == stem for stem, keys in found.items())
    groups = {
        group: sum(keys["group"] == group for keys in found.values())
        for group in ("natural", "specialized", "structured")
    }
    assert groups == {"natural": 7, "specialized": 4, "structured": 8}
    # SSF's train_scripts/vit/vtab name the same numbers of classes
    assert [
        found[t]["num_classes"] for t in ("caltech101", "cifar", "clevr_count", "clevr_dist", "diabetic_retinopathy")
    ] == [102, 100, 8, 6, 5]
    assert [found[t]["num_classes"] for t in ("dmlab", "dsprites_loc", "dsprites_ori", "dtd", "eurosat")] == [
        6,
        16,
        16,
        47,
        10,
    ]
    assert [
        found[t]["num_classes"] for t in ("oxford_flowers102", "kitti", "patch_camelyon", "oxford_iiit_pet", "resisc45")
    ] == [102, 4, 2, 37, 45]
    assert [found[t]["num_classes"] for t in ("smallnorb_azi", "smallnorb_ele", "sun397", "svhn")] == [18, 9, 397, 10]


@pytest.mark.parametrize(
    ("folder", "num_classes", "num_test"),
    [("caltech101", 102, 500), ("cifar", 100, 1400), ("dtd_subset10", 10, 200), ("eurosat", 10, 1000),
     ("oxford_flowers102", 102, 500), ("oxford_iiit_pet", 37, 470), ("resisc45_subset12", 12, 500)],
)  # fmt: skip
def test_real_lists(shared_data, folder, num_classes, num_test):
    data = task(folder=folder, keep_decoded=0).load(TRANSFORM, config(shared_data))
    sizes = [len(split) for phase in data.phases for split in (phase.train, phase.validation[""])]
    assert sizes == [800, 200, 1000, num_test]
    assert data.about["num_classes"] == num_classes
    image, label = data.phases[0].train[0]
    assert image.shape == (3, 8, 8)
    assert 0 <= label < num_classes
