"""The config group `optimizer`: each shipped file builds the optimiser that it describes, and senseless runs are refused."""

from __future__ import annotations

import functools
from pathlib import Path

import optim_helpers as helpers
import pytest
import torch
import yaml
from pydantic import ValidationError
from text_helpers import composed
from tiny import tiny_llama, tiny_roberta, tiny_vit, token_batch

from velora.cli import conf_dir
from velora.config.parts import Optimizer, part_class
from velora.errors import ConfigError
from velora.optim import Adafactor, Flora, GaLoreAdamW, GrassAdamW, Lomo, QGaLoreAdamW
from velora.optim.groups import weight_decay_groups

FILES = sorted(Path(conf_dir(), "optimizer").glob("*.yaml"))


def part(name, **changes):
    settings = {**yaml.safe_load(Path(conf_dir(), "optimizer", f"{name}.yaml").read_text()), **changes}
    return part_class("optimizer", settings["kind"], Optimizer).model_validate(settings)


plain = functools.cache(composed)


def run(adapter="full", **trainer):
    config = plain("method=full", f"adapter={adapter}", "seed=7")
    defaults = {
        "learning_rate": 1e-2, "weight_decay": 0.1, "micro_batch_size": None, "batch_size": 16, "max_grad_norm": None,
        "precision": "fp32",
    }  # fmt: skip
    return config.model_copy(update={"trainer": config.trainer.model_copy(update={**defaults, **trainer})})


def one_step(model, optimizer):
    model(**token_batch()).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_trains_a_tiny_llama(file):
    if file.stem in ("adamw_8bit", "q_galore"):
        pytest.importorskip("bitsandbytes", minversion="0.50")
    model, optimizer_part = tiny_llama(), part(file.stem)
    assert not list(optimizer_part.problems(run()))
    optimizer = optimizer_part.build(model, run())
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert {group["lr"] for group in optimizer.param_groups} == {1e-2}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert all(decays[id(p)] == (0.1 if p.ndim == 2 else 0.0) for p in model.parameters())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    one_step(model, optimizer)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_settings_arrive():
    galore = part("galore", scale=2.0, svd="randomized", proj_type="full", betas=[0.5, 0.6], eps=0.1, update_proj_gap=9)
    optimizer = galore.build(tiny_llama(), run())
    assert isinstance(optimizer, GaLoreAdamW)
    expected = {
        "scale": 2.0, "svd": "randomized", "proj_type": "full", "betas": (0.5, 0.6), "eps": 0.1, "update_proj_gap": 9, "bits": 32,
    }  # fmt: skip
    assert expected.items() <= optimizer.param_groups[0].items()
    assert optimizer.seed == 7
    changes = {
        "scale": 2.0,
        "svd": "randomized",
        "update_proj_gap": 9,
        "eps": 0.1,
        "cos_threshold": 0.5,
        "queue_size": 3,
    }
    q_galore = part("q_galore", betas=[0.5, 0.6], bits=32, **changes).build(tiny_llama(), run())
    assert isinstance(q_galore, QGaLoreAdamW)
    assert {**changes, "betas": (0.5, 0.6), "bits": 32}.items() <= q_galore.param_groups[0].items()
    assert q_galore.seed == 7
    changes = {"scale": 2.0, "selection": "sampled", "update_gap": 9, "eps": 0.1}
    grass = part("grass", betas=[0.5, 0.6], **changes).build(tiny_llama(), run())
    assert isinstance(grass, GrassAdamW)
    assert {**changes, "betas": (0.5, 0.6)}.items() <= grass.param_groups[0].items()
    assert grass.seed == 7
    flora = part("flora", kappa=9, beta1=0.5, sketched="all", scale_parameter=False).build(tiny_llama(), run())
    assert isinstance(flora, Flora)
    expected = {"kappa": 9, "beta1": 0.5, "sketched": "all", "scale_parameter": False, "clip_threshold": 1.0}
    assert expected.items() <= flora.param_groups[0].items()
    assert part("lomo", max_grad_value=2.0).build(tiny_llama(), run()).param_groups[0]["max_grad_value"] == 2.0
    adafactor = part("adafactor").build(tiny_llama(), run())
    assert isinstance(adafactor, Adafactor)
    expected = {
        "relative_step": False,
        "scale_parameter": False,
        "beta1": None,
        "eps": (1e-30, 1e-3),
        "decay_rate": -0.8,
    }
    assert expected.items() <= adafactor.param_groups[0].items()
    layerwise = part("galore", layerwise=True).build(tiny_llama(), run(micro_batch_size=4))
    assert layerwise.layerwise
    assert layerwise.accumulation_steps == 4
    assert isinstance(part("lomo").build(tiny_llama(), run()), Lomo)


@pytest.mark.parametrize("name", ["galore", "q_galore", "grass", "flora"])
def test_a_fraction_as_rank_follows_each_matrix(name):
    """The shorter side is 32 in all 14 matrices of the tiny LLaMA."""
    for rank, expected in ((0.25, 8), (6, 6)):
        optimizer = part(name, rank=rank).build(tiny_llama(), run())
        low_rank = [group for group in optimizer.param_groups if "rank" in group]
        assert [(len(group["params"]), group["rank"]) for group in low_rank] == [(14, expected)]


def test_layers_by_role_and_by_pattern():
    model = tiny_llama()
    optimizer = part("galore", layers=["value", "*.layers.1.mlp.up_proj"]).build(model, run())
    chosen = {id(p) for group in optimizer.param_groups if "rank" in group for p in group["params"]}
    layers = model.model.layers
    assert chosen == {id(w) for w in (*(b.self_attn.v_proj.weight for b in layers), layers[1].mlp.up_proj.weight)}


@pytest.mark.parametrize(("build", "num"), [(tiny_llama, 14), (tiny_roberta, 12), (tiny_vit, 8)])
def test_default_layers_of_every_family(build, num):
    """7, 6 (query, key, value, output, up, down) and 4 (fused qkv, output, up, down) in each of two blocks."""
    optimizer = part("galore").build(build(), run())
    assert sum(len(group["params"]) for group in optimizer.param_groups if "rank" in group) == num


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": ["valeu"]}, "the pattern 'valeu' matches no module"),
        ({"layers": ["lm_hed"]}, "matches no module"),
        ({"layers": ["mlp"]}, "has no weight matrix of its own"),
        ({"layers": ["norm"]}, "has no weight matrix of its own"),
        ({"rank": 33}, r"rank 33 for model.layers.0.self_attn.q_proj of shape \(32, 32\); it must be between 1 and 31"),
        ({"rank": 32}, "rank 32 for model.layers.0.self_attn.q_proj .* a full rank saves nothing"),
        ({"rank": 0.01}, "is rank 0 for"),
    ],
)
def test_layers_and_ranks_that_do_not_fit(changes, message):
    with pytest.raises(ConfigError, match=message):
        part("galore", **changes).build(tiny_llama(), run())


def test_an_unknown_architecture_and_a_missing_role():
    with pytest.raises(ConfigError, match=r"its architecture is not in velora/config/roles.py; name roles or patterns"):
        part("galore").build(helpers.tiny_network(), run())
    with pytest.raises(ConfigError, match="has no gate; its roles are query"):
        part("galore", layers=["gate"]).build(tiny_roberta(), run())


@pytest.mark.parametrize(
    ("name", "changes", "trainer", "sentence"),
    [
        ("galore", {}, {"adapter": "lora"}, "use adapter=full or optimizer=adamw"),
        ("q_galore", {}, {"adapter": "lora"}, "use adapter=full or optimizer=adamw"),
        ("q_galore", {"layerwise": True}, {"max_grad_norm": 1.0}, "set trainer.max_grad_norm=null"),
        ("grass", {}, {"adapter": "lora"}, "use adapter=full or optimizer=adamw"),
        ("grass", {"layerwise": True}, {"max_grad_norm": 1.0}, "set trainer.max_grad_norm=null"),
        ("flora", {}, {"adapter": "linear_probe"}, "use adapter=full or optimizer=adamw"),
        ("galore", {"layerwise": True}, {"max_grad_norm": 1.0}, "set trainer.max_grad_norm=null"),
        ("galore", {"layerwise": True}, {"precision": "fp16"}, "use trainer.precision=bf16 or fp32"),
        ("flora", {"beta1": None}, {}, "use optimizer=adafactor"),
        ("lomo", {}, {"max_grad_norm": 1.0}, "set trainer.max_grad_norm=null"),
        ("lomo", {}, {"micro_batch_size": 8}, "set trainer.micro_batch_size=null"),
    ],
)
def test_what_cannot_be_combined_is_said_in_a_sentence(name, changes, trainer, sentence):
    problems = list(part(name, **changes).problems(run(**trainer)))
    assert len(problems) == 1
    assert sentence in problems[0]


@pytest.mark.parametrize(("name", "changes"), [("galore", {"layerwise": True}), ("lomo", {})])
def test_several_processes_are_refused_before_anything_is_loaded(name, changes, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    (problem,) = part(name, **changes).problems(run(max_grad_norm=None))
    assert "in 2 processes: a layer-wise optimiser uses gradients before they are averaged" in problem
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not list(part(name, **changes).problems(run(max_grad_norm=None)))


@pytest.mark.parametrize(
    ("name", "changes", "trainer"),
    [
        ("galore", {"layerwise": True}, {"micro_batch_size": 4}),
        ("galore", {}, {"max_grad_norm": 1.0, "precision": "fp16"}),
        ("flora", {"beta1": None, "layerwise": True}, {"micro_batch_size": 4}),
    ],
)
def test_what_can_be_combined_is_not_refused(name, changes, trainer):
    assert not list(part(name, **changes).problems(run(**trainer)))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("galore", {"rank": 1.5}), ("galore", {"rank": 0}), ("galore", {"bits": 4}), ("galore", {"betas": [0.9, 1.0]}),
        ("flora", {"decay_rate": 0.8}), ("flora", {"sketched": "none"}), ("adamw_8bit", {"min_8bit_size": 0}),
        ("lomo", {"max_grad_value": 0.0}), ("galore", {"layers": []}), ("grass", {"rank": 1.5}), ("grass", {"update_gap": 0}),
        ("q_galore", {"cos_threshold": 0.0}), ("q_galore", {"queue_size": 0}), ("q_galore", {"bits": 4}),
        ("grass", {"scale": 0.0}), ("grass", {"selection": "best"}),
    ],
)  # fmt: skip
def test_values_out_of_range(name, changes):
    with pytest.raises(ValidationError):
        part(name, **changes)


def test_the_rank_of_grass_counts_rows():
    """The tiny LLaMA's up_proj is 48 x 32: 40 of its rows may be picked, where GaLore has at most 31 directions."""
    optimizer = part("grass", layers=["up"], rank=40).build(tiny_llama(), run())
    assert optimizer.param_groups[0]["rank"] == 40
    with pytest.raises(ConfigError, match=r"rank 48 for .* \(48, 32\); it must be between 1 and 47: a full rank saves"):
        part("grass", layers=["up"], rank=48).build(tiny_llama(), run())
    with pytest.raises(ConfigError, match="it must be between 1 and 31"):
        part("galore", layers=["up"], rank=40).build(tiny_llama(), run())


def test_tied_weights_stand_once():
    model = tiny_llama(tie_word_embeddings=True)
    optimizer = part("galore", layers=["lm_head", "model.embed_tokens"]).build(model, run())
    assert [len(group["params"]) for group in optimizer.param_groups if "rank" in group] == [1]


def test_state_bytes_of_the_tiny_llama():
    """All optimisers on one network: each formula counted here from the shapes."""
    expected = {}
    attention, mlp, rest = 8 * [(32, 32)], 4 * [(48, 32)] + 2 * [(32, 48)], [(64, 32), (64, 32)]  # embedding and head
    vectors = 5 * 32  # norms
    dense = sum(m * n for m, n in attention + mlp + rest) + vectors
    low = attention + mlp
    others = sum(m * n for m, n in rest) + vectors
    expected["adamw"] = 4 * (2 * dense) + 4 * (14 + 2 + 5)  # torch keeps each step counter as an fp32 tensor
    expected["galore"] = 4 * sum(8 * (2 * max(s) + min(s)) for s in low) + 4 * 2 * others
    expected["grass"] = sum(8 * (2 * 4 * columns + 8) for _, columns in low) + 4 * 2 * others  # rows as 64-bit integers
    factored = sum(m + n for m, n in low + rest) + vectors
    expected["flora"] = 4 * (sum(8 * max(s) for s in low) + sum(m * n for m, n in rest) + vectors + factored)
    expected["adafactor"] = 4 * factored + 4 * (14 + 2 + 5)  # and the size of each parameter
    expected["lomo"] = 0
    for name, num_bytes in expected.items():
        model = tiny_llama()
        optimizer = part(name).build(model, run())
        one_step(model, optimizer)
        assert helpers.state_bytes(optimizer) == num_bytes, name


class TestAdamW8bit:
    @pytest.fixture(autouse=True)
    def bnb(self):
        return pytest.importorskip("bitsandbytes", minversion="0.50", reason="no 8-bit optimiser on a CPU before 0.50")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_resume_is_exact(self, dtype):
        for smallest in (1, 4096):
            helpers.assert_resume_is_exact(
                lambda model, smallest=smallest: part("adamw_8bit", min_8bit_size=smallest).build(model, run()), dtype
            )

    def test_state_bytes(self):
        model = torch.nn.Linear(100, 100, bias=False)
        optimizer = part("adamw_8bit").build(model, run())
        model(torch.randn(2, 100)).sum().backward()
        optimizer.step()
        tables = 2 * 256 * 4  # the values of the two 8-bit types, shared by all parameters
        assert helpers.state_bytes(optimizer) == 2 * (100 * 100 + 4 * 40) + tables  # 40 blocks of 256


def test_adamw_resume_is_exact():
    helpers.assert_resume_is_exact(lambda model: part("adamw").build(model, run()))
    assert len(weight_decay_groups(helpers.tiny_network(), 0.1)) == 2
