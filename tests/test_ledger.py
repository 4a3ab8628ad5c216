"""The ledger against the profiler's own record of allocations, and against counts made by hand.

The independent count is `memory_helpers.allocator_bytes`. Both counts are whole bytes, so all comparisons are exact.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from memory_helpers import allocator_bytes, loss_of
from tiny import tiny_llama, tiny_roberta, tiny_vit
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from velora.memory.ledger import Ledger, measure_saved_bytes, take_ledger
from velora.memory.storages import unique_bytes
from velora.nn.apply import apply_velora


class KeepsOnCtx(torch.autograd.Function):
    """y = 2x + 0·k, keeping a tensor of its own on ctx beside the hooks."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.kept = torch.full((1000,), 2.0)
        return x * ctx.kept[0]

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * ctx.kept[0]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(torch.nn.functional.gelu(self.up(self.norm(x)))))


class Net(nn.Module):
    def __init__(self, how: str = "plain", width: int = 16) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.how == "plain":
                x = block(x)
            elif self.how == "ctx":
                x = KeepsOnCtx.apply(block(x))
            else:
                x = checkpoint(block, x, use_reentrant=self.how == "reentrant")
        return x.square().mean()


def test_linear_by_hand() -> None:
    layer, x = nn.Linear(8, 5), torch.randn(7, 8)
    # x lived before; backward of square keeps the layer's output (7 x 5), that of mean nothing
    assert measure_saved_bytes(lambda: layer(x).square().mean()) == 7 * 5 * 4


def test_one_storage_read_thrice_counts_once() -> None:
    readers, x = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), torch.randn(7, 8)

    def forward() -> Tensor:
        shared = x + 1  # kept by three layers, through three different views
        outputs = [reader(shared.view(1, 7, 8)[:, i:]) for i, reader in enumerate(readers)]
        return torch.stack([output.sum() for output in outputs]).sum()

    assert measure_saved_bytes(forward) == 7 * 8 * 4


@pytest.mark.parametrize("how", ["plain", "ctx", "reentrant", "non_reentrant"])
def test_equals_the_allocator(how: str) -> None:
    torch.manual_seed(0)
    net, x = Net(how), torch.randn(6, 16, requires_grad=True)
    net(x).backward()
    # each checkpointed region keeps the state of the random numbers, which is made without the dispatcher
    random_state_bytes = 3 * torch.get_rng_state().nbytes if "reentrant" in how else 0
    assert measure_saved_bytes(lambda: net(x)) == allocator_bytes(lambda: net(x)) - random_state_bytes > 0


@pytest.mark.parametrize("how", ["plain", "ctx", "reentrant", "non_reentrant"])
def test_backward_works_afterwards_and_nothing_is_shifted(how: str) -> None:
    net, x = Net(how), torch.randn(6, 16, requires_grad=True)
    kept: list[Tensor] = []

    def forward() -> Tensor:
        kept.append(net(x))
        return kept[-1]

    torch.manual_seed(1)
    forward().backward()
    expected, noise = [p.grad.clone() for p in net.parameters()], torch.rand(3)
    net.zero_grad()
    torch.manual_seed(1)
    measure_saved_bytes(forward)
    kept[-1].backward()
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(torch.rand(3), noise)
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), expected, strict=True))


def test_sparse_gradients_are_counted() -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    embedding(torch.tensor([3, 3, 5])).sum().backward()
    gradient = embedding.weight.grad
    assert gradient is not None
    assert not gradient.is_coalesced()
    assert unique_bytes([gradient]) == 3 * 8 + gradient._values().untyped_storage().nbytes()


def test_reused_addresses_are_no_living_storages() -> None:
    weight = torch.randn(100, requires_grad=True)

    def forward() -> Tensor:
        for _ in range(50):  # the allocator hands out the same address again and again
            torch.empty(100).fill_(1)
        return (weight * weight.detach().clone()).sum()

    assert measure_saved_bytes(forward) == 400


def test_autocast_keeps_the_cast_weight() -> None:
    layer, x = nn.Linear(8, 4, bias=False), torch.randn(3, 8, requires_grad=True)

    def forward() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer(x).float().sum()

    # bf16 copies of x (for the weight's gradient) and of the weight (for the input's)
    assert measure_saved_bytes(forward) == 3 * 8 * 2 + 4 * 8 * 2


def test_without_gradient_nothing_is_held() -> None:
    net, x = Net(), torch.randn(6, 16)
    with torch.no_grad():
        assert measure_saved_bytes(lambda: net(x)) == 0


def llama_on(layers: list[str], **sizes: int) -> nn.Module:
    model = tiny_llama(**sizes)
    if layers:
        apply_velora(model, layers, num_groups=4, init="random")
    return model


@pytest.mark.parametrize("make", [tiny_llama, tiny_roberta, tiny_vit])
def test_ledger_sums_equal_the_allocator(make: Callable[[], nn.Module]) -> None:
    model = make()
    forward = loss_of(model)
    forward().backward()
    ledger = take_ledger(model, forward)
    assert ledger.total_bytes == allocator_bytes(forward) == measure_saved_bytes(forward) > 0
    for by in ("kind", "role", "term", "holders", "module"):
        assert sum(ledger.grouped(by).values()) == ledger.total_bytes
    assert ledger.outside_hook_bytes == 0
    assert {item.name for item in ledger.lived_before if item.what == "parameter"} <= dict(
        model.named_parameters()
    ).keys()


def test_all_holders_are_named() -> None:
    model = tiny_llama()
    ledger = take_ledger(model, loss_of(model))
    shared = [entry for entry in ledger.entries if {h.role for h in entry.holders} == {"query", "key", "value"}]
    assert len(shared) == 2  # one per block: 2 sequences of 8 tokens, hidden 32
    assert [entry.num_bytes for entry in shared] == [2 * 8 * 32 * 4] * 2
    assert {holder.module for holder in shared[0].holders} == {
        f"model.layers.0.self_attn.{name}_proj" for name in "qkv"
    }
    assert all(holder.operation == "MmBackward0" for holder in shared[0].holders)
    assert shared[0].made_in == "model.layers.0.input_layernorm"


def test_kept_outside_the_hook_is_listed() -> None:
    net = Net("ctx")
    ledger = take_ledger(net, lambda: net(torch.randn(6, 16, requires_grad=True)))
    outside = [entry for entry in ledger.entries if entry.outside_hook]
    assert [entry.num_bytes for entry in outside] == [4000] * 3
    assert ledger.outside_hook_bytes == 12000
    assert all("KeepsOnCtx" in e.holders[0].operation and "ctx.kept" in e.holders[0].operation for e in outside)


@pytest.mark.parametrize("how", ["reentrant", "non_reentrant"])
def test_checkpointed_regions_keep_their_input(how: str) -> None:
    net = Net(how)
    x = torch.randn(6, 16, requires_grad=True)
    ledger = take_ledger(net, lambda: net(x))
    # the first region's input lived before; those of the second and third, and the operand of the final square
    assert ledger.grouped("term") == {"input of a checkpointed region": 2 * 6 * 16 * 4, "activation": 6 * 16 * 4}


def test_dropout_masks_are_told_apart() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8, bias=False))
    x = torch.randn(5, 8)
    ledger = take_ledger(model, lambda: model(x).sum())
    assert ledger.grouped("term") == {"dropout mask": 5 * 8 * 4, "activation": 5 * 8 * 4}


def test_weight_copies_of_autocast_are_told_apart() -> None:
    layer, x = nn.Linear(8, 4, bias=False), torch.randn(3, 8, requires_grad=True)

    def forward() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer(x).float().sum()

    assert take_ledger(layer, forward).grouped("term") == {"copy of a weight": 64, "activation": 48}


def test_codes_are_told_apart() -> None:
    model = llama_on(["down"])
    assert take_ledger(model, loss_of(model)).grouped("term")["VeLoRA codes"] == 2 * (2 * 8 * 4) * 4  # z: N x G


def test_backward_works_after_a_ledger() -> None:
    model, kept = tiny_llama(), []
    forward = loss_of(model)
    forward().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    take_ledger(model, lambda: kept.append(forward()) or kept[0])
    kept[0].backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))


def test_a_ledger_leaves_no_graph_behind() -> None:
    model = tiny_llama()
    held = allocator_bytes(lambda: take_ledger(model, loss_of(model)) and torch.zeros(1))
    assert held == 0


def test_json_is_plain() -> None:
    model = tiny_vit()
    ledger = take_ledger(model, loss_of(model))
    plain = json.loads(json.dumps(ledger.to_json()))
    assert plain["total_bytes"] == sum(storage["num_bytes"] for storage in plain["storages"]) == ledger.total_bytes


@pytest.mark.parametrize(
    ("layers", "expected_mib"),
    [
        ([], 352),
        (["value", "down"], 311),
        (["query", "key", "value", "down"], 297),
        (["query", "key", "value", "output", "gate", "up", "down"], 284),
    ],
)
def test_finding_of_the_paper_notes(layers: list[str], expected_mib: int) -> None:
    """The measured table of the method notes, section 4: 4 blocks, hidden 512, MLP 1376, 2048 tokens, fp32, MiB.

    Its figures are whole MiB. They come out with 32 groups and a vocabulary of 1000.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=4, num_attention_heads=8, vocab_size=1000
    )
    model = LlamaForCausalLM(config).train()
    if layers:
        apply_velora(model, layers, num_groups=32, init="random")
    words = torch.zeros(8, 256, dtype=torch.long)
    ledger: Ledger = take_ledger(model, lambda: model(input_ids=words, labels=words, use_cache=False).loss)
    assert round(ledger.total_bytes / 2**20) == expected_mib
