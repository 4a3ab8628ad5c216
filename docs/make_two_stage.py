"""What one LLaMA block keeps between the two stages of a split backward pass: the table of docs/memory.md.

    python docs/make_two_stage.py

The block is one pipeline stage; torch.distributed.pipelining's own functions take it through the two stages. What is alive
in between, the gradient for the stage before it apart, is added up by storage, as everywhere in velora/memory.
"""

from __future__ import annotations

import gc
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.pipelining._backward import stage_backward_input

from velora import apply_velora, calibrate
from velora.memory.ledger import measure_saved_bytes, take_ledger
from velora.memory.storages import AllocationTracker, plain_tensors, storage_key
from velora.nn.split_backward import defer_weight_gradients

HIDDEN, MLP, NUM_HEADS, TOKENS = 768, 2048, 12, (4, 256)


class Kept(NamedTuple):
    """Bytes: after the forward, between the stages, and of the latter the gradients (dy) that wait for the second one."""

    forward: int
    between: int
    waiting: int


def kept(stage: nn.Module, x: Tensor) -> Kept:
    """What a stage keeps for an input x, where the graph is gone through twice."""
    x = x.detach().requires_grad_()
    forward = measure_saved_bytes(lambda: stage(x))
    with AllocationTracker() as tracker:
        output = stage(x)
        dinputs, groups = stage_backward_input((output,), [torch.ones_like(output)], [x], stage.parameters())
    gc.collect()
    between = tracker.living(apart_from=[output, *dinputs])
    waiting = {storage_key(t) for group in groups for t in plain_tensors(group["grads"])}
    return Kept(forward, sum(between.values()), sum(between.get(key, 0) for key in waiting))


def kept_where_deferred(stage: nn.Module, x: Tensor) -> int:
    """Bytes between the stages where the first is an ordinary backward; gradients of parameters, which stay, apart."""
    x = x.detach().requires_grad_()
    deferred = defer_weight_gradients(stage)
    with AllocationTracker() as tracker:
        output = stage(x)
        output.backward(torch.ones_like(output))
    gc.collect()
    between = tracker.living(apart_from=[output, x.grad, *(p.grad for p in stage.parameters() if p.grad is not None)])
    deferred()()
    return sum(between.values())


def inputs_of_linear_layers(stage: nn.Module, x: Tensor) -> int:
    """Bytes of all inputs of linear layers, each once, from the ledger of the plain stage."""
    x = x.detach().requires_grad_()
    ledger = take_ledger(stage, lambda: stage(x))
    layers = {name for name, module in stage.named_modules() if isinstance(module, nn.Linear)}
    entries = {entry for name in layers for entry in ledger.inputs[name]}
    return sum(ledger.entries[entry].num_bytes for entry in entries)


class Block(nn.Module):
    """A decoder block that makes its own rotary embedding, as a stage of a pipeline gets the hidden states only."""

    def __init__(self) -> None:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

        config = LlamaConfig(hidden_size=HIDDEN, intermediate_size=MLP, num_attention_heads=NUM_HEADS)
        config._attn_implementation = "sdpa"
        super().__init__()
        self.layer, self.rotary = LlamaDecoderLayer(config, 0), LlamaRotaryEmbedding(config)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        return self.layer(x, position_embeddings=self.rotary(x, positions), position_ids=positions)


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(*TOKENS, HIDDEN)
    block = Block()
    plain = kept(block, x)
    inputs_and_dy = inputs_of_linear_layers(block, x) + plain.waiting
    apply_velora(block, "all", sub_token_size=16)
    calibrate(block, x)
    velora = kept(block, x)
    rows = {
        "after the forward": (plain.forward, velora.forward),
        "between the stages, the graph gone through twice": (plain.between, velora.between),
        "of that, dy of layers and norms": (plain.waiting, velora.waiting),
        "between the stages, what dW needs alone": (inputs_and_dy, kept_where_deferred(block, x)),
    }
    print("| MB | plain | VeLoRA |\n|---|---|---|")
    for name, figures in rows.items():
        print(f"| {name} | " + " | ".join(f"{num_bytes / 1e6:.1f}" for num_bytes in figures) + " |")


if __name__ == "__main__":
    main()
