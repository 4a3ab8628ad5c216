"""The ledger of the demo's methods: totals equal the allocator's, byte for byte, and value alone frees nothing.

The ledger is taken as velora-memory takes it, on fake tensors; the independent count is what the CPU allocator has handed
out and not got back (`memory_helpers.allocator_bytes`) in a real forward of the real network.
"""

from __future__ import annotations

import pytest
import torch
from memory_helpers import allocator_bytes
from test_estimate import configured

from velora.memory.estimate import pretend
from velora.memory.freed import layers_that_free_nothing
from velora.memory.ledger import Ledger, take_ledger
from velora.memory.meter import synthetic_batch, training_loss
from velora.models.build import build_network

DEMO = ["task=manual", "model=llama_tiny", "trainer.batch_size=4"]
CASES = {
    "full": ["method=full"],
    "value": ["method=velora", "activations.layers=[value]"],
    "value, down": ["method=velora"],
    "query, key, value, down": ["method=velora", "activations.layers=[query,key,value,down]"],
    "all": ["method=velora_all"],
    "lora_velora": ["method=lora_velora"],
    "checkpoint": ["method=checkpoint"],
}


def ledger_of(case: str) -> tuple[Ledger, list[str]]:
    pretended = pretend(configured(*DEMO, *CASES[case]))
    with pretended.context():
        ledger = take_ledger(pretended.network, pretended.losses[0])
    return ledger, layers_that_free_nothing(pretended.network, ledger)


@pytest.mark.parametrize("case", CASES)
def test_total_equals_the_allocators(case: str) -> None:
    config = configured(*DEMO, *CASES[case])
    preprocessor = config.model.preprocessor(config)
    network, _ = build_network(config, config.task.head(config), preprocessor)
    network.train()
    batch = synthetic_batch(config, config.trainer.batch_size)
    batch["input_ids"] = torch.randint(3, 250, batch["input_ids"].shape)  # different words: a mean that is not zero
    config.activations.calibrate(network, [batch])
    forward = training_loss(network, batch, config)
    forward().backward()
    num_regions = 0 if case != "checkpoint" else network.config.num_hidden_layers
    random_states = num_regions * torch.get_rng_state().nbytes  # one per checkpointed region, not counted by the ledger
    # each LoRA layer multiplies by its scaling: autograd keeps the Python number as a tensor made inside the operator
    scalings = 8 * sum(hasattr(module, "lora_A") for module in network.modules())
    assert ledger_of(case)[0].total_bytes == allocator_bytes(forward) - random_states - scalings


def test_value_alone_frees_nothing_and_costs_its_codes() -> None:
    plain, _ = ledger_of("full")
    value, warnings = ledger_of("value")
    assert value.total_bytes - plain.total_bytes == value.grouped("term")["VeLoRA codes"] > 0
    assert len(warnings) == 1
    assert "add query, key" in warnings[0]


def test_each_further_choice_frees_more() -> None:
    totals = [ledger_of(case)[0].total_bytes for case in ("full", "value, down", "query, key, value, down", "all")]
    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) == 4
