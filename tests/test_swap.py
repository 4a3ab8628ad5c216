"""Finding and replacing modules, and the table of roles."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

from velora.config.roles import (
    ARCHITECTURES,
    ROLES,
    find_architecture,
    matches,
    resolve_roles,
    role_of,
    roles_by_module,
    roles_of,
)
from velora.errors import ConfigError
from velora.nn.scale_shift import ScaleShift
from velora.nn.swap import expand_container, find_modules, module_names, replace_modules


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


def network() -> nn.Module:
    shared = nn.Linear(4, 4)
    return nn.ModuleDict(
        {"blocks": nn.ModuleList([nn.ModuleDict({"fc1": nn.Linear(4, 8), "fc2": nn.Linear(8, 4)}) for _ in range(2)]),
         "head": shared, "tied": shared}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("blocks.0.fc1", "fc1", True),
        ("blocks.0.fc1", "blocks.*.fc1", True),
        ("base_model.model.blocks.0.fc1", "blocks.*.fc1", True),
        ("blocks.0.xfc1", "fc1", False),
        ("blocks.0.fc1.lora_A", "fc1", False),
        ("blocks.0.fc1", "FC1", False),
    ],
)
def test_matches(name, pattern, expected):
    assert matches(name, pattern) is expected


def test_find_modules_gives_each_module_once_in_order():
    model = network()
    assert list(find_modules(model, ["fc2", "blocks.0.*"])) == ["blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc2"]
    assert list(find_modules(model, ["tied"])) == ["tied"]
    assert list(find_modules(model, ["tied", "head"])) == ["head"]
    assert "tied" in module_names(model)


def test_find_modules_names_every_pattern_without_a_match():
    with pytest.raises(ConfigError, match=r"'fc3' matches no module of ModuleDict; .*'fc4'"):
        find_modules(network(), ["fc1", "fc3", "fc4"])


def test_replace_modules_reaches_all_names_of_a_module():
    model = network()
    old = model["head"]
    made = replace_modules(model, ["head", "fc1"], lambda name, module: Wrapper(module))
    assert list(made) == ["blocks.0.fc1", "blocks.1.fc1", "head"]
    assert model["head"] is model["tied"] is made["head"]
    assert model["head"].inner is old
    assert isinstance(model["blocks"][1]["fc1"], Wrapper)
    assert type(model["blocks"][1]["fc2"]) is nn.Linear


def test_replace_modules_may_nest():
    model = network()
    replace_modules(model, ["blocks.0", "blocks.0.fc1"], lambda name, module: Wrapper(module))
    assert isinstance(model["blocks"][0], Wrapper)
    assert isinstance(model["blocks"][0].inner["fc1"], Wrapper)


def test_replace_modules_collects_refusals_and_leaves_the_model():
    model = network()
    before = dict(model.named_modules())

    def make(name: str, module: nn.Module) -> nn.Module:
        if name.endswith("fc1"):
            raise ConfigError("no")
        return Wrapper(module)

    with pytest.raises(ConfigError, match=r"blocks.0.fc1: no; blocks.1.fc1: no"):
        replace_modules(model, ["fc1", "fc2"], make)
    assert dict(model.named_modules()) == before


def test_containers_stand_for_their_children():
    class Hydra(nn.Module):
        velora_children = ("downs", "extra")

        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(4, 4)
            self.downs = nn.ModuleDict({"parallel": nn.Linear(4, 2), "sequential": nn.Linear(4, 2)})
            self.extra = Ssf()

    class Ssf(nn.Module):
        velora_children = ("scale_shift",)

        def __init__(self) -> None:
            super().__init__()
            self.scale_shift = ScaleShift(4)

    names = [name for name, _ in expand_container("proj", Hydra())]
    assert names == ["proj.downs.parallel", "proj.downs.sequential", "proj.extra.scale_shift"]
    plain = nn.Linear(4, 4)
    assert list(expand_container("fc", plain)) == [("fc", plain)]


def _transformers_models():
    import transformers as t

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = {"vocab_size": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    image = {"image_size": 8, "patch_size": 4}
    yield "llama", t.LlamaModel, t.LlamaConfig(**sizes, **words)
    yield "llama", t.MistralModel, t.MistralConfig(**sizes, **words, num_key_value_heads=2)
    yield "bert", t.BertModel, t.BertConfig(**sizes, **words)
    yield "bert", t.RobertaModel, t.RobertaConfig(**sizes, **words)
    yield "bert", t.ElectraModel, t.ElectraConfig(**sizes, **words)
    yield "deberta", t.DebertaV2Model, t.DebertaV2Config(**sizes, **words)
    yield (
        "opt",
        t.OPTModel,
        t.OPTConfig(
            hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=16, **words
        ),
    )
    yield "distilbert", t.DistilBertModel, t.DistilBertConfig(dim=16, hidden_dim=24, n_layers=1, n_heads=2, **words)
    yield "gpt_neox", t.GPTNeoXModel, t.GPTNeoXConfig(**sizes, **words)
    yield "vit", t.ViTModel, t.ViTConfig(**sizes, **image)


def test_the_table_knows_the_architectures_of_transformers_and_timm():
    for expected, cls, config in _transformers_models():
        with torch.device("meta"):
            names = [name for name, module in cls(config).named_modules() if isinstance(module, nn.Linear)]
        assert find_architecture(names) == expected, cls.__name__
        roles = resolve_roles(names)
        found = {name: role for name in names if (role := role_of(name, roles))}
        assert set("+".join(found.values()).split("+")) == set(ARCHITECTURES[expected]), cls.__name__
        # every linear layer of the one block has a role, and no two the same
        block = [name for name in names if "pooler" not in name and "embeddings" not in name]
        assert len(found) == len(block) == len(set(found.values())), cls.__name__
    assert find_architecture(module_names(tiny.tiny_vit())) == "timm_vit"


def test_roles_of_bert_tell_the_two_output_layers_apart():
    roles = resolve_roles(module_names(tiny.tiny_roberta()))
    assert role_of("roberta.encoder.layer.11.attention.output.dense", roles) == "output"
    assert role_of("roberta.encoder.layer.11.output.dense", roles) == "down"
    assert role_of("classifier.dense", roles) is None


def test_given_roles_win_and_must_be_lists():
    names = module_names(tiny.tiny_llama())
    assert resolve_roles(names, {"value": ["x"]}, {"value": ["y"]}) == {"value": ["x"]}
    assert resolve_roles(names, None, {"value": ["y"]}) == {"value": ["y"]}
    assert resolve_roles(["a", "b"]) == {}
    with pytest.raises(ConfigError, match="must be a list of patterns"):
        resolve_roles(names, {"value": "x"})
    assert all(set(roles) <= set(ROLES) for roles in ARCHITECTURES.values())


def test_roles_are_read_through_wrappers():
    from peft import LoraConfig, get_peft_model

    model = tiny.tiny_llama()
    model.velora_roles = {"value": ["v_proj"]}
    wrapped = nn.DataParallel(get_peft_model(model, LoraConfig(target_modules=["v_proj"])))
    assert roles_of(wrapped) == model.velora_roles
    assert roles_of(wrapped, {"key": ["k_proj"]}) == {"key": ["k_proj"]}
    found = roles_by_module(wrapped)
    assert set(found.values()) == {"value"}
    assert sum(path.endswith("lora_A.default") for path in found) == 2  # the layers inside play their container's role
