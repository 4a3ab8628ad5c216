"""What would be freed, predicted on the plain model, against what is freed once the layers are swapped: exact bytes."""

from __future__ import annotations

import pytest
import torch
from memory_helpers import loss_of
from tiny import tiny_llama, tiny_roberta, tiny_vit, token_batch
from torch import nn

from velora.memory.freed import layers_by_role, layers_that_free_nothing, what_would_be_freed
from velora.memory.ledger import measure_saved_bytes, take_ledger
from velora.nn.apply import apply_velora, calibrate
from velora.nn.projection import split_width

ROLES = ["query", "key", "value", "output", "gate", "up", "down"]
CHOICES = [
    ["query"],
    ["value"],
    ["output"],
    ["gate"],
    ["down"],
    ["value", "down"],
    ["query", "key", "value", "down"],
    ROLES,
]


def predicted_and_actual(make, layers: list[str], num_groups: int = 4) -> tuple[int, int]:
    model = make()
    by_role = layers_by_role(model)
    chosen = list(dict.fromkeys(path for role in layers for path in by_role[role]))
    sizes = {p: split_width(model.get_submodule(p).in_features, num_groups=num_groups)[1] for p in chosen}
    ledger = take_ledger(model, loss_of(model))
    (freed,) = what_would_be_freed(ledger, {"chosen": chosen}, sizes, shared_codes=False)
    before = measure_saved_bytes(loss_of(model))
    apply_velora(model, layers, num_groups=num_groups, init="random")
    return freed.saved_bytes, before - measure_saved_bytes(loss_of(model))


@pytest.mark.parametrize("layers", CHOICES, ids="+".join)
def test_prediction_in_llama(layers: list[str]) -> None:
    predicted, actual = predicted_and_actual(tiny_llama, layers)
    assert predicted == actual


def test_codes_that_are_shared() -> None:
    """Query, key and value have one code between them where their directions are those of the data."""
    model, layers, groups = tiny_llama(), ["query", "key", "value", "gate", "up"], 4
    paths = [path for role in layers for path in layers_by_role(model)[role]]
    (freed,) = what_would_be_freed(take_ledger(model, loss_of(model)), {"chosen": paths}, dict.fromkeys(paths, 8))
    before = measure_saved_bytes(loss_of(model))
    apply_velora(model, layers, num_groups=groups)
    calibrate(model, token_batch())
    assert freed.saved_bytes == before - measure_saved_bytes(loss_of(model))


@pytest.mark.parametrize("make", [tiny_roberta, tiny_vit])
@pytest.mark.parametrize(
    "layers", [["value"], ["down"], ["query", "key", "value", "output", "up", "down"]], ids="+".join
)
def test_prediction_elsewhere(make, layers: list[str]) -> None:
    predicted, actual = predicted_and_actual(make, layers)
    assert predicted == actual


def test_prediction_for_lora_with_dropout() -> None:
    from peft import LoraConfig, get_peft_model

    def make() -> nn.Module:
        settings = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj", "down_proj"])
        return get_peft_model(tiny_llama(), settings)

    predicted, actual = predicted_and_actual(make, ["value", "down"])
    # each adapter holds its own dropped copy: 2 blocks x 16 tokens x (32 + 48) features, in place of 4 groups each
    assert predicted == actual == 2 * 16 * (32 + 48 - 4 - 4) * 4


def test_value_alone_frees_nothing_in_llama_and_the_warning_names_the_others() -> None:
    model = tiny_llama()
    apply_velora(model, ["value"], num_groups=4, init="random")
    (sentence,) = layers_that_free_nothing(model, take_ledger(model, loss_of(model)))
    assert sentence == (
        "VeLoRA on value frees no memory: its input is also kept by query, key; add query, key to the layers to free it"
    )


def test_output_never_frees_anything() -> None:
    model = tiny_llama()
    apply_velora(model, ["output", "down"], num_groups=4, init="random")
    (sentence,) = layers_that_free_nothing(model, take_ledger(model, loss_of(model)))
    assert sentence.startswith("VeLoRA on output frees no memory: its input is also kept by LlamaAttention (ScaledDot")
    assert sentence.endswith("no choice of layers frees it")


@pytest.mark.parametrize("layers", [["query", "key", "value"], ["down"], ["gate", "up"]], ids="+".join)
def test_no_warning_where_all_holders_are_chosen(layers: list[str]) -> None:
    model = tiny_llama()
    apply_velora(model, layers, num_groups=4, init="random")
    assert layers_that_free_nothing(model, take_ledger(model, loss_of(model))) == []


def test_partly_kept_is_said_so() -> None:
    model = tiny_llama()
    apply_velora(model, ["value", "layers.0.self_attn.[qk]_proj"], num_groups=4, init="random")
    sentences = layers_that_free_nothing(model, take_ledger(model, loss_of(model)))
    assert any(s.startswith("VeLoRA on value frees no memory in 1 of its 2 layers") for s in sentences)
    assert torch.is_grad_enabled()
