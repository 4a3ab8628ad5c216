"""Checkpoints that others made: padding, heads, damage, limits, foreign code. Everything tiny, made here, read from a folder."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import adapters
import pytest
import torch
from checkpoints import FAMILIES, built, network_options, run, save_network, save_tokenizer

from velora.data.text import Row, collate
from velora.errors import ConfigError
from velora.nn.adapter_state import load_adapter, save_adapter

SHORT, LONG = "w3 w9 w12", "w1 w2 w5 w8 w13 w21 w34 w7 w30 w11"
NONE_NAMED = [name for name, (_, decoder) in FAMILIES.items() if decoder]


def logits(network: Any, tokenizer: Any, *texts: str) -> torch.Tensor:
    batch = collate([Row((text,), 0) for text in texts], tokenizer, 32, regression=False)
    del batch["labels"]
    with torch.no_grad():
        return network(**batch).logits


def attention(model_type: str) -> dict[str, str]:
    return {"attention": network_options(model_type).get("attn_implementation", "sdpa")}


@pytest.mark.parametrize(
    ("model_type", "named"), [(name, True) for name in FAMILIES] + [(name, False) for name in NONE_NAMED]
)
def test_logits_do_not_depend_on_the_neighbours(tmp_path: Path, model_type: str, named: bool) -> None:
    """Expected: the network by itself, on the text alone and without any padding."""
    their = save_network(tmp_path, model_type, **({} if named else {"pad_token_id": None}))
    save_tokenizer(tmp_path, padding="<pad>" if named else None)
    network, tokenizer = built(run(tmp_path, **attention(model_type)))
    words = [0, *(int(word[1:]) + 4 for word in SHORT.split()), 2]
    with torch.no_grad():
        alone = their(input_ids=torch.tensor([words])).logits
    assert network.config.get_text_config().pad_token_id == tokenizer.pad_token_id
    found = logits(network, tokenizer, SHORT, LONG)
    # float32: a longer row is summed in another order
    torch.testing.assert_close(found[:1], alone, atol=1e-5, rtol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-3  # texts are told apart


def test_padding_of_network_and_tokenizer_that_differ(tmp_path: Path) -> None:
    """The network names token 9, the tokenizer <pad> (1): the network's goes first, its published outputs stay."""
    their = save_network(tmp_path, "opt", pad_token_id=9)
    save_tokenizer(tmp_path)
    network, tokenizer = built(run(tmp_path))
    assert (tokenizer.pad_token_id, network.config.pad_token_id) == (9, 9)
    with torch.no_grad():
        alone = their(input_ids=torch.tensor([[0, 7, 13, 16, 2]])).logits
    torch.testing.assert_close(logits(network, tokenizer, SHORT, LONG)[:1], alone, atol=1e-5, rtol=1e-5)


def test_a_padding_token_that_is_no_word_is_replaced(tmp_path: Path) -> None:
    save_network(tmp_path, "llama", pad_token_id=-1)
    save_tokenizer(tmp_path)
    network, tokenizer = built(run(tmp_path))
    assert (tokenizer.pad_token_id, network.config.pad_token_id) == (1, 1)


# What each adapter must train beside itself: the head, and what a checkpoint without a head or pooler lacks.
NEW_PARTS = {
    "bert": ["bert.pooler", "classifier"], "albert": ["albert.pooler", "classifier"], "bart": ["classification_head"],
    "roberta": ["classifier"], "distilbert": ["pre_classifier", "classifier"], "deberta-v2": ["pooler", "classifier"],
    "gpt_neox": ["score"],
}  # fmt: skip


def without_pooler(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if "pooler" not in name}
    save_file(kept, file, metadata={"format": "pt"})


@pytest.mark.parametrize("adapter", ["lora", "ssf"])
@pytest.mark.parametrize("model_type", NEW_PARTS)
def test_a_saved_adapter_gives_the_same_logits_at_every_load(tmp_path: Path, model_type: str, adapter: str) -> None:
    save_network(tmp_path, model_type, base=True)
    without_pooler(tmp_path)
    save_tokenizer(tmp_path)

    def adapted(seed: int) -> tuple[Any, Any]:
        config = run(tmp_path, seed=seed, **attention(model_type))
        network, tokenizer = built(config)
        assert network.velora_head == NEW_PARTS[model_type]
        part = (
            adapters.lora(targets=["attention.value" if model_type == "albert" else "value"])
            if adapter == "lora"
            else adapters.ssf()
        )
        return part.apply(network, config).eval(), tokenizer

    first, tokenizer = adapted(seed=0)
    adapters.perturb(first)
    save_adapter(first, tmp_path / "adapter")
    again, _ = adapted(seed=1)  # another seed: what is new starts from other numbers
    assert not torch.equal(logits(again, tokenizer, LONG), logits(first, tokenizer, LONG))
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again, tokenizer, LONG, SHORT), logits(first, tokenizer, LONG, SHORT))


def test_a_pooler_of_the_checkpoint_is_frozen(tmp_path: Path) -> None:
    their = save_network(tmp_path, "bert")
    save_tokenizer(tmp_path)
    network, _ = built(run(tmp_path))
    assert network.velora_head == ["classifier"]
    assert torch.equal(network.bert.pooler.dense.weight, their.bert.pooler.dense.weight)
    assert torch.equal(network.classifier.weight, their.classifier.weight)  # of the same size: read


def test_a_head_of_another_size_is_replaced(tmp_path: Path) -> None:
    their = save_network(tmp_path, "bert", num_labels=5)
    save_tokenizer(tmp_path)
    network, _ = built(run(tmp_path), num_labels=3)
    assert network.classifier.weight.shape == (3, 32)
    assert 0 < network.classifier.weight.std() < 0.1  # initialised, not left as it came
    assert torch.equal(network.bert.pooler.dense.weight, their.bert.pooler.dense.weight)


def damaged(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)


class _Malicious:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("executed"),))


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def poison(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    state["bert.encoder.layer.1.output.dense.weight"][3, 4] = float("nan")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def as_pickle(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(_Malicious()))


def lose_a_shard(folder: Path) -> None:
    import transformers

    network = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    network.save_pretrained(folder, max_shard_size="20KB")
    next(folder.glob("model-00002-of-*")).unlink()


WEIGHTS = "model.safetensors"
DAMAGES: dict[str, tuple[Any, str]] = {
    "cut": (lambda f: damaged(f, WEIGHTS, (f / WEIGHTS).read_bytes()[:5000]), "cannot be loaded: SafetensorError"),
    "cut header": (lambda f: damaged(f, WEIGHTS, (f / WEIGHTS).read_bytes()[:50]), "cannot be loaded: SafetensorError"),
    "empty": (lambda f: damaged(f, WEIGHTS, b""), "cannot be loaded: SafetensorError"),
    "junk": (lambda f: damaged(f, WEIGHTS, b"\xff" * 999), "cannot be loaded: SafetensorError"),
    "pickle named safetensors": (lambda f: as_pickle(f, WEIGHTS), "cannot be loaded: SafetensorError"),
    "malicious pickle": (lambda f: as_pickle(f, "pytorch_model.bin"), "such a pickle is never run; give model.path=DIR"),
    "missing shard": (lose_a_shard, "cannot be loaded: "),
    "config no JSON": (lambda f: damaged(f, "config.json", b'{"model_type": '), "cannot be loaded: "),
    "config a list": (lambda f: damaged(f, "config.json", b"[]"), "cannot be loaded: "),
    "config in Latin-1": (lambda f: damaged(f, "config.json", b'{"a": "\xe9"}'), "cannot be loaded: "),
    "unknown model": (lambda f: edit_config(f, model_type="nonsense"), "cannot be loaded: "),
    "heads do not divide": (lambda f: edit_config(f, num_attention_heads=3), "cannot be loaded: "),
    "negative layers": (lambda f: edit_config(f, num_hidden_layers=-1), ": num_hidden_layers=-1 must be at least 1"),
    "fewer layers": (lambda f: edit_config(f, num_hidden_layers=1), "describes fewer blocks than its weights have"),
    "more layers": (lambda f: edit_config(f, num_hidden_layers=3), "parameters are missing or of another shape"),
    "another width": (lambda f: edit_config(f, hidden_size=64), "parameters are missing or of another shape"),
    "NaN": (poison, "the weights bert.encoder.layer.1.output.dense.weight are not finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_one_sentence(tmp_path: Path, case: str, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "theirs"
    save_network(folder, "bert")
    save_tokenizer(folder)
    damage, sentence = DAMAGES[case]
    damage(folder)
    with pytest.raises(ConfigError) as caught:
        built(run(folder))
    found = str(caught.value)
    assert found.startswith(f"model.path={folder}")
    assert sentence in found
    assert "give " in found or "choose " in found  # a remedy
    assert "\n" not in found
    assert not (tmp_path / "executed").exists()


def test_weights_without_a_place_are_said(tmp_path: Path, capsys) -> None:
    save_network(tmp_path, "bert")
    from safetensors.torch import load_file, save_file

    state = load_file(tmp_path / WEIGHTS) | {"cls.predictions.bias": torch.zeros(3)}
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    save_tokenizer(tmp_path)
    built(run(tmp_path))
    assert (
        "1 of its weights have no place in this network and were not read (cls.predictions.bias)"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("pretrained", [True, False])
def test_limits_of_the_checkpoint(tmp_path: Path, pretrained: bool) -> None:
    """False is how velora-memory builds it."""
    save_network(tmp_path, "bert", max_position_embeddings=32)
    save_tokenizer(tmp_path)
    built(run(tmp_path, pretrained=pretrained, length=32))
    with pytest.raises(ConfigError, match=r"^task.max_length=33 is more than the 32 positions of model=theirs$"):
        built(run(tmp_path, pretrained=pretrained, length=33))
    save_tokenizer(tmp_path, num_words=41)
    with pytest.raises(
        ConfigError, match=r"^the tokenizer of model=theirs has 45 words and the network embeds 44: give"
    ):
        built(run(tmp_path, pretrained=pretrained))


def test_positions_of_roberta_begin_after_the_padding(tmp_path: Path) -> None:
    save_network(tmp_path, "roberta", max_position_embeddings=34)
    save_tokenizer(tmp_path)
    network, tokenizer = built(run(tmp_path, length=32))
    logits(network, tokenizer, " ".join(["w1"] * 30))  # 32 tokens: the most there is place for
    with pytest.raises(ConfigError, match=r"^task.max_length=33 is more than the 32 positions"):
        built(run(tmp_path, length=33))


def test_attention_that_a_network_does_not_have(tmp_path: Path) -> None:
    save_network(tmp_path, "deberta-v2")
    save_tokenizer(tmp_path)
    for pretrained in (True, False):
        with pytest.raises(
            ConfigError, match=r"^model.attention=sdpa does not work for .*; give model.attention=eager"
        ):
            built(run(tmp_path, pretrained=pretrained))
    built(run(tmp_path, attention="eager"))
    with pytest.raises(ConfigError, match=r"^model.attention=nonsense does not work for"):
        built(run(tmp_path, attention="nonsense"))


def test_path_and_pretrained(tmp_path: Path) -> None:
    architecture = {"model_type": "bert", "vocab_size": None, **FAMILIES["bert"][0]}
    their = save_network(tmp_path, "bert")
    save_tokenizer(tmp_path)

    def config(path: Path | None, pretrained: bool | None, **more: Any) -> Any:
        return run(path, pretrained=pretrained, tokenizer=str(tmp_path / "words"), architecture=architecture, **more)

    def problems(config: Any) -> list[str]:
        return list(config.model.problems(config))

    given = config(tmp_path, None)
    assert not problems(given)
    network, _ = built(given)  # a path is given, so it is read
    assert torch.equal(network.bert.pooler.dense.weight, their.bert.pooler.dense.weight)
    random, _ = built(config(None, None))
    assert not torch.equal(random.bert.pooler.dense.weight, their.bert.pooler.dense.weight)
    (sentence,) = problems(config(tmp_path, False))
    assert sentence.startswith(
        f"model.path={tmp_path} with model.pretrained=false: the weights in it would not be read"
    )
    shape_only = run(tmp_path, pretrained=False)  # no architecture in the YAML: that of the folder, with random weights
    assert not problems(shape_only)
    random, _ = built(shape_only)
    assert random.bert.pooler.dense.weight.shape == (32, 32)
    assert not torch.equal(random.bert.pooler.dense.weight, their.bert.pooler.dense.weight)


BAD_ARCHITECTURES = {
    "misspelt": (
        {"num_hiden_layers": 2},
        "model.architecture.num_hiden_layers is not a key of the architecture llama; did you mean "
        "model.architecture.num_hidden_layers?",
    ),
    "of another family": ({"n_embd": 2}, "model.architecture.n_embd is not a key of the architecture llama"),
    "negative layers": ({"num_hidden_layers": -2}, "model.architecture.num_hidden_layers=-2 must be at least 1"),
    "no width": ({"hidden_size": 0}, "model.architecture.hidden_size=0 must be at least 1"),
    "no family": ({"model_type": "lama"}, "model_type=lama is no architecture of transformers; did you mean llama?"),
    "heads": ({"num_attention_heads": 3}, "is not valid: The hidden size (32) is not a multiple"),
    "a word": ({"hidden_size": "wide"}, "is not valid: "),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ARCHITECTURES)
def test_architecture_in_the_yaml(case: str) -> None:
    changes, sentence = BAD_ARCHITECTURES[case]
    architecture = {"model_type": "llama", "vocab_size": None, "rope_theta": 5e5, **FAMILIES["llama"][0]}
    built(run(None, "causal_lm", pretrained=None, tokenizer="byte", architecture=architecture), None)
    with pytest.raises(ConfigError) as caught:
        built(run(None, "causal_lm", pretrained=None, tokenizer="byte", architecture=architecture | changes), None)
    assert sentence in str(caught.value)


@pytest.fixture
def no_prompt(monkeypatch) -> None:
    def ask(*_: Any) -> str:
        pytest.fail("asked on the terminal")

    monkeypatch.setattr("builtins.input", ask)


FOREIGN = "from pathlib import Path\nPath('executed').touch()\nclass Foreign: pass\n"


def test_foreign_code_of_a_model_or_tokenizer_is_not_run(tmp_path: Path, monkeypatch, no_prompt) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "theirs"
    save_network(folder, "bert")
    save_tokenizer(folder)
    (folder / "foreign.py").write_text(FOREIGN)
    config_json = json.loads((folder / "config.json").read_text())
    edit_config(folder, model_type="foreign", auto_map={"AutoConfig": "foreign.Foreign"})
    with pytest.raises(ConfigError, match=rf"^model.path={folder} cannot be loaded: it wants to run code of its own"):
        built(run(folder))
    (folder / "config.json").write_text(json.dumps(config_json))
    edit_config(folder, auto_map={"AutoModelForSequenceClassification": "foreign.Foreign"})
    built(run(folder))  # a known architecture: its own class is taken
    built(run(folder, pretrained=False))
    file = folder / "words" / "tokenizer_config.json"
    foreign = {"tokenizer_class": "Foreign", "auto_map": {"AutoTokenizer": ["foreign.Foreign", "foreign.Foreign"]}}
    file.write_text(json.dumps(json.loads(file.read_text()) | foreign))
    (folder / "words" / "foreign.py").write_text(FOREIGN)
    with pytest.raises(
        ConfigError, match=rf"^the tokenizer in {folder}/words cannot be loaded: it wants to run code of its own"
    ):
        built(run(folder))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("task", ["glue", "c4"])
def test_foreign_code_of_a_data_set_is_not_run(tmp_path: Path, monkeypatch, no_prompt, task: str) -> None:
    from text_helpers import stand_in, yaml_keys

    from velora.config.task_text import C4, Glue
    from velora.models.tokenizer import byte_tokenizer

    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "theirs.py").write_text(FOREIGN)
    hub = str(tmp_path / "theirs")
    if task == "glue":
        part: Any = Glue(**(yaml_keys("recipe/shared/glue") | {"name": "glue/sst2", "hub": hub}))
    else:
        part = C4(**(yaml_keys("task/c4") | {"name": "c4", "hub": hub}))
    with pytest.raises(ConfigError, match=rf"^the data set {hub} of task=.* cannot be loaded: .*; give data.root=DIR"):
        part.load(byte_tokenizer(), stand_in())
    assert not (tmp_path / "executed").exists()
