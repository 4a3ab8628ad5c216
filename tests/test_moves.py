"""Moving along an axis of a method or an experiment: what its file has set for another value of the axis goes."""

from __future__ import annotations

from pathlib import Path

import pytest
from composition import EXPERIMENTS
from text_helpers import composed

from velora.cli import launch
from velora.config.compose import conf_dir
from velora.config.run import AXES, Config, differing_keys
from velora.errors import ConfigError

METHODS = sorted(file.stem for file in (conf_dir() / "method").glob("*.yaml"))
VALUES = [f"{axis}={file.stem}" for axis in AXES for file in sorted((conf_dir() / axis).glob("*.yaml"))]


def refused(*overrides: str) -> str | None:
    """The sentence, or None where it composes."""
    try:
        composed(*overrides)
    except ConfigError as error:
        return str(error)
    return None


REASONS = (
    "weights=nf4 with adapter=full: weights in four bits do not train",
    "trainer.max_grad_norm=1.0 with optimizer=lomo",
    "makes the state of large trained matrices smaller, and here they are frozen",
    "int8 weights are there to be trained, and here they are frozen",
    "only Q-GaLore rounds an updated weight back to eight bits",
    "adapter=lte with weights=nf4: the heads are merged into the weights",
    "only VeLoRA's gradients have factors",
    "activations.layers=null names no layers",  # adapter=ssf, which has no targets
)


EACH_TIME = {"full", "ssf", "qlora_velora", "lte", "q_galore", "grass_velora_factored", "velora_all"}
"""Between them they set keys of every axis; the others with `pytest -m slow`."""


@pytest.mark.parametrize(
    "method", [name if name in EACH_TIME else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_every_value_of_every_axis_composes_with_every_method_or_makes_no_sense_with_it(method: str) -> None:
    sentences = filter(None, (refused(f"method={method}", value) for value in VALUES))
    assert [sentence for sentence in sentences if not any(reason in sentence for reason in REASONS)] == []


def test_all_five_axes_and_twenty_five_methods_are_meant() -> None:
    assert AXES == ("weights", "adapter", "optimizer", "activations", "recompute")
    assert len(METHODS) == 25


ROWS = [name for name in EXPERIMENTS if name.startswith(("table", "memory/", "vtab_", "galore"))]
PLAIN = ("activations=exact", "adapter=full", "optimizer=adamw", "recompute=none", "weights=dense")


@pytest.mark.parametrize("name", ROWS)
def test_every_row_moves_to_the_plain_values(name: str) -> None:
    raw = composed(f"experiment={name}", *PLAIN).raw
    assert raw["activations"] == {"kind": "exact"}
    assert raw["adapter"] == {"kind": "full"}
    for value in ("activations=exact", "adapter=full"):
        assert not (sentence := refused(f"experiment={name}", value)) or sentence.startswith(REASONS[0])


def test_what_is_left_behind_is_not_in_the_record_and_makes_no_other_run() -> None:
    moved, plain = composed("method=lora_velora", "activations=exact"), composed("method=lora")
    assert moved.raw["activations"] == {"kind": "exact"}
    assert differing_keys(moved.raw, plain.raw) == {"method.name"}


def test_a_run_of_a_version_without_the_group_differs_by_it_alone() -> None:
    new = composed("method=full").raw
    old = {key: value for key, value in new.items() if key != "recompute"}
    assert differing_keys(old, new) == {"recompute.kind"}


def test_it_may_refer_to_what_is_gone() -> None:
    """`activations.layers` of the method is ${adapter.targets}, or [value, down] where the adapter has none."""
    assert composed("method=lora_velora").activations.layers == ["query", "value"]
    assert composed("method=lora_velora", "adapter=full").activations.layers == ["value", "down"]
    assert composed("method=lora_velora", "adapter=full", "activations=exact").raw["adapter"] == {"kind": "full"}
    row = composed("experiment=table4/galore", "optimizer=adamw")
    assert set(row.raw["optimizer"]) == {"kind", "betas", "eps", "fused"}


def test_what_both_kinds_have_keeps_the_value_of_the_method() -> None:
    row = ("experiment=table2/velora", "task=glue/cola")
    given = composed(*row).adapter
    assert composed(*row, "adapter=hydra").adapter.targets == given.targets == ["query", "value", "down"]
    assert composed("experiment=table4/flora", "optimizer=adamw").optimizer.eps == 1e-8  # FLoRA's is a pair
    assert composed("method=checkpoint", "recompute=blocks").recompute.lean is False
    assert composed("method=full", "recompute=blocks").recompute.lean is True


def test_what_the_user_gives_himself_is_refused_not_dropped() -> None:
    sentence = refused("method=lora_velora", "activations=exact", "activations.layers=[value]")
    assert "activations.layers is a key of activations=velora, not of activations=exact" in (sentence or "")
    assert "activations.scale is a key of" in (
        refused("method=velora", "activations=exact", "activations.scale=2") or ""
    )
    assert "activations.scale is a key of" in (
        refused("method=velora", "+activations.scale=2", "activations=exact") or ""
    )


def test_a_value_that_is_not_chosen_by_the_user_keeps_what_is_wrong(tmp_path: Path) -> None:
    import velora

    file = tmp_path / "method" / "mine.yaml"
    file.parent.mkdir()
    file.write_text(
        "# @package _global_\ndefaults: [full, _self_]\nmethod: {name: mine}\nactivations: {layers: [value]}\n"
    )
    with pytest.raises(
        ConfigError, match=r"activations\.layers is a key of activations=velora, not of activations=exact"
    ):
        velora.compose("method=mine", config_dir=tmp_path)
    moved = velora.compose("method=mine", "activations=exact", config_dir=tmp_path)
    assert moved.raw["activations"] == {"kind": "exact"}


def test_each_point_of_a_multirun_moves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["velora-train", "-m", "method=lora_velora,velora_all", "activations=velora,exact"])
    found: list[Config] = []
    assert launch("velora-train", lambda config: found.append(config)) == 0
    assert [(c.method.name, c.activations.kind, len(c.raw["activations"])) for c in found] == [
        ("lora_velora", "velora", 6), ("lora_velora", "exact", 1), ("velora_all", "velora", 6), ("velora_all", "exact", 1),
    ]  # fmt: skip
