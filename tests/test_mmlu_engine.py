"""Shared examples give what full prompts give.

Shapes: prompts of random words over the 64 of tests/tiny.py. The tolerance 1e-5 is for float32 sums in another order (the
log-probabilities are about 4); the full prompts go one by one, without padding or cache, through the network itself.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, tiny_llama
from torch import nn

from velora.eval.shared_prefix import next_token_log_probs

CANDIDATES = (5, 9, 17, 33)


def some_prompts(number: int = 7, common: int = 20, seed: int = 0) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)

    def words(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCABULARY, (length,), generator=generator).tolist())

    beginning = words(common)
    return [beginning + words(3 + 5 * i % 13) for i in range(number)]


def one_by_one(network: nn.Module, prompts: list[tuple[int, ...]]) -> torch.Tensor:
    with torch.no_grad():
        rows = [network(input_ids=torch.tensor([ids])).logits[0, -1].float().log_softmax(-1) for ids in prompts]
    return torch.stack(rows)[:, list(CANDIDATES)]


def grouped_heads() -> nn.Module:
    return tiny_llama(num_key_value_heads=2).eval()


def gpt2() -> nn.Module:
    """Learned positions, and a fused projection."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4)).eval()


def windowed() -> nn.Module:
    """Keeps a window of 8 tokens, so its cache cannot be shared."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return MistralForCausalLM(
        MistralConfig(vocab_size=VOCABULARY, sliding_window=8, num_key_value_heads=2, **sizes)
    ).eval()


def with_lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    adapted: Any = get_peft_model(grouped_heads(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return adapted.eval()


def with_velora() -> nn.Module:
    from velora import apply_velora

    network = grouped_heads()
    apply_velora(network, ["*.v_proj", "*.down_proj"], sub_token_size=8)
    return network.eval()


@pytest.mark.parametrize("build", [grouped_heads, gpt2, windowed, with_lora, with_velora])
@pytest.mark.parametrize("share", [True, False])
def test_equals_each_prompt_alone(build: Any, share: bool) -> None:
    network, prompts = build(), some_prompts()
    found = next_token_log_probs(network, prompts, CANDIDATES, batch_size=3, share=share)
    torch.testing.assert_close(found, one_by_one(network, prompts), atol=1e-5, rtol=0)


def test_equals_each_prompt_alone_in_four_bits() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", minversion="0.50")
    network = grouped_heads()
    for layer in network.model.layers:
        plain = layer.mlp.down_proj
        quantised = bitsandbytes.nn.Linear4bit(48, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        quantised.load_state_dict(copy.deepcopy(plain.state_dict()))
        layer.mlp.down_proj = quantised.to("cpu")
    prompts = some_prompts()
    found = next_token_log_probs(network, prompts, CANDIDATES, batch_size=3)
    # 1e-3: the kernel for a single row and that for many round differently
    torch.testing.assert_close(found, one_by_one(network, prompts), atol=1e-3, rtol=0)


@pytest.mark.parametrize("prompts", [[(4, 5, 6)], [(4, 5, 6), (4, 5, 6)], [(4, 5), (4, 5, 6)], [(4,), (5, 6)]])
def test_few_and_equal_prompts(prompts: list[tuple[int, ...]]) -> None:
    network = grouped_heads()
    found = next_token_log_probs(network, prompts, CANDIDATES, batch_size=2)
    torch.testing.assert_close(found, one_by_one(network, prompts), atol=1e-5, rtol=0)


def test_the_common_beginning_is_computed_once() -> None:
    """Tokens that go through the embedding: 20 once, and of each batch its longest ending times its rows."""
    network, prompts = grouped_heads(), some_prompts()
    seen: list[int] = []
    network.get_input_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].numel()))
    next_token_log_probs(network, prompts, CANDIDATES, batch_size=3)
    endings = sorted((len(ids) - 20 for ids in prompts), reverse=True)
    assert seen == [20, 3 * endings[0], 3 * endings[3], endings[6]]


def test_leaves_the_network_as_it_was() -> None:
    network, prompts = grouped_heads(), some_prompts()
    before = one_by_one(network, prompts[:1])
    next_token_log_probs(network, prompts, CANDIDATES, batch_size=3)
    assert torch.equal(one_by_one(network, prompts[:1]), before)
    assert network(input_ids=torch.tensor([prompts[0]])).logits.shape == (1, len(prompts[0]), VOCABULARY)
