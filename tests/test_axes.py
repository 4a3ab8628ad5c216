"""Bytes per axis: each method makes the term of its own axis smaller and no other, on every family, counted in unique storages.

Counted here by data pointer over parameters, gradients and optimiser state, apart from the program's own bookkeeping; what
autograd keeps comes from `measure_saved_bytes`, whose own tests compare it with independent counts.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from text_helpers import composed

from velora.memory.ledger import measure_saved_bytes
from velora.models.build import build_network

FAMILIES = ("llama_tiny", "roberta_tiny", "vit_tiny")
TERMS = ("weights", "gradients", "optimizer", "saved")


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)


def storage_bytes(values) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in values}.values())


@cache
def terms(model: str, method: str, recompute: str | None = None) -> dict[str, int]:
    """The four terms of one training step of a method, in bytes."""
    moved = [f"recompute={recompute}"] if recompute else []
    config = composed(f"method={method}", f"model={model}", "task=embedded", "trainer.batch_size=4", *moved)
    preprocessor = config.model.preprocessor(config)
    data = config.task.load(preprocessor, config)
    torch.manual_seed(0)
    network, _ = build_network(config, config.task.head(config), preprocessor)
    network.train()
    train = data.phases[0].train
    batch = data.collate([train[i] for i in range(4)])
    config.activations.calibrate(network, [batch])
    optimizer = config.optimizer.build(network, config)
    saved = measure_saved_bytes(lambda: network(**batch)["loss"])
    network(**batch)["loss"].backward()
    gradients = storage_bytes(p.grad for p in network.parameters() if p.grad is not None)
    optimizer.step()
    return {
        "weights": storage_bytes([*network.parameters(), *network.buffers()]),
        "gradients": gradients,
        "optimizer": storage_bytes(tensors(list(optimizer.state.values()))),
        "saved": saved,
    }


# What each method makes smaller than full training. An adapter takes gradients away, and with them optimiser state; frozen
# layers need no input for a weight gradient, so activations shrink too, or grow where an adapter computes beside the layer.
SMALLER = {
    "velora": {"saved"},
    "velora_all": {"saved"},
    "checkpoint": {"saved"},
    "galore": {"optimizer"},
    "flora": {"optimizer"},
    "q_galore": {"weights", "gradients", "optimizer", "saved"},  # gradients and activations in bfloat16
    "q_galore_velora": {"weights", "gradients", "optimizer", "saved"},
    "grass": {"optimizer"},
    "grass_velora": {"optimizer", "saved"},
    "grass_velora_factored": {"gradients", "optimizer", "saved"},
    "linear_probe": {"gradients", "optimizer", "saved"},
    "lora": {"gradients", "optimizer"},
    "ssf": {"gradients", "optimizer"},
    "hydra": {"gradients", "optimizer"},
    "multilora": {"gradients", "optimizer"},
    "lte": {"gradients", "optimizer"},
    "qlora": {"weights", "gradients", "optimizer"},
    "qpissa": {"weights", "gradients", "optimizer"},
}
FREE = {method: {"saved"} for method in ("lora", "ssf", "hydra", "multilora", "lte", "qlora", "qpissa")}
SMALL = 0.02  # added modules, directions and step counters may add this much of full training's bytes to a term ...
ADDED = {
    "lora": 0.12,
    "ssf": 0.12,
    "hydra": 0.12,
    "multilora": 0.12,
    "lte": 1.5,  # four heads of rank 8, and what is merged of them: 64 rows and columns beside a width of 128
}  # ... and these adapters their own parameters, large beside tiny networks


@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize("method", SMALLER)
def test_each_method_makes_its_own_term_smaller_and_no_other(model, method):
    full, found = terms(model, "full"), terms(model, method)
    for term in TERMS:
        if term in SMALLER[method]:
            assert found[term] < full[term], term
        elif term not in FREE.get(method, set()):
            assert full[term] <= found[term] <= full[term] * (1 + ADDED.get(method, SMALL)), term


@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize(
    ("plain", "with_velora"),
    [(name, f"{name}_velora") for name in ("lora", "ssf", "hydra", "multilora", "lte", "qlora", "grass", "q_galore")],
)
def test_velora_on_a_method_shrinks_what_is_saved_and_nothing_else(model, plain, with_velora):
    before, after = terms(model, plain), terms(model, with_velora)
    assert after["saved"] < before["saved"]
    assert after["gradients"] == before["gradients"]
    assert after["optimizer"] == before["optimizer"]
    assert 0 <= after["weights"] - before["weights"] <= SMALL * before["weights"]  # the directions


@pytest.mark.parametrize("model", FAMILIES)
def test_factors_shrink_the_state_of_velora_layers_further(model):
    """S = 16: their moments have a sixteenth of the numbers."""
    plain, factored = terms(model, "grass_velora"), terms(model, "grass_velora_factored")
    assert factored["optimizer"] < plain["optimizer"]
    assert factored["saved"] == plain["saved"]
    assert factored["weights"] == plain["weights"]


@pytest.mark.parametrize("model", FAMILIES)
def test_pissa_over_four_bits_takes_what_lora_takes(model):
    assert terms(model, "qpissa") == terms(model, "qlora")


@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize("method", ["full", "velora_all"])
def test_each_level_of_recompute_keeps_less_and_changes_nothing_else(model, method):
    none, lean, mlp, blocks = (terms(model, method, value) for value in ("none", "lean", "mlp", "blocks"))
    assert none["saved"] >= lean["saved"] > mlp["saved"] > blocks["saved"]
    if (model, method) != (
        "vit_tiny",
        "velora_all",
    ):  # without dropout VeLoRA leaves lean nothing: norm and GELU keep their input
        assert none["saved"] > lean["saved"]
    for level in (lean, mlp, blocks):
        assert {term: level[term] for term in TERMS[:3]} == {term: none[term] for term in TERMS[:3]}


@pytest.mark.parametrize("model", FAMILIES)
def test_terms_of_full_training_are_what_arithmetic_says(model):
    """fp32 throughout: gradients as large as the parameters, AdamW's two moments twice that and a step counter a tensor."""
    config = composed(f"model={model}", "task=embedded", "method=full")
    network, _ = build_network(config, config.task.head(config), config.model.preprocessor(config))
    parameters = list(network.parameters())
    num_bytes = 4 * sum(p.numel() for p in parameters)
    found = terms(model, "full")
    assert found["gradients"] == num_bytes
    assert found["optimizer"] == 2 * num_bytes + 4 * len(parameters)
