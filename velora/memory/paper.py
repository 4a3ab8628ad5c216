"""The paper's own accounting, beside what is really used: Tables 3, 5b and 6 of arXiv 2405.17991 are not measured.

They count the inputs of the trainable layers, once per layer: query, key and value as three inputs although they
read one tensor, the output projection, the down projection; gate and up are left out, and so is everything that is no
linear layer (norms, SwiGLU, attention, logits). Table 3 adds frozen weights and adapters.

    inputs = layers x tokens x (4 D + F) x bytes                    D hidden size, F MLP width
    VeLoRA: a compressed input of width W counts W / S in place of W   S sub-token size

The settings are not stated in the paper. Those below reproduce all printed figures but one, to their last digit:

- tokens x bytes = 2048 (512 tokens in fp32, or 1024 in half precision); "GB" is GiB, "MB" of Table 5b is GiB x 1000.
- Table 5b: value and down; its D/64, D/32, D/16 and D/8 are S = 8, 16, 32 and 64, as if D were 512 for 7B.
- Table 6: S = 128 (32 groups of 4096). The last row (all of query, key, value and down) is printed as 0.24; the formula gives
  0.26, and nothing that fits the other rows gives 0.24.
- Table 3: value and down with S = 32 for 7B and 128 for 13B, as the paper's text says. Weights of the blocks half a byte
  each; in the row "LoRA (bf16)" one byte each, although bf16 has two: with two it would be 14.8 and 27.6.
  Embedding, head and norms in fp32. The adapters' part is small (0.10 and 0.16): rank 32 on query, key, value, up and down in
  bf16 fits it. The published scripts have all seven layers, and rank 64 for 13B, which gives 0.8 % and 3 % more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn

from velora.config.roles import roles_by_module
from velora.memory.storages import unique_bytes
from velora.nn.int8 import int8_layers
from velora.nn.twin import VeloraTwin

COUNTED_ROLES = ("query", "key", "value", "output", "down")


@dataclass(frozen=True)
class LlamaShape:
    """A LLaMA as the accounting sees it."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int = 32_000

    def width(self, role: str) -> int:
        """In-features of a layer."""
        return self.intermediate_size if role == "down" else self.hidden_size

    def out_width(self, role: str) -> int:
        return self.intermediate_size if role in ("gate", "up") else self.hidden_size


LLAMA_7B = LlamaShape(num_layers=32, hidden_size=4096, intermediate_size=11_008)
LLAMA_13B = LlamaShape(num_layers=40, hidden_size=5120, intermediate_size=13_824)

BYTES_OF_ALL_TOKENS = 2048
TABLE_6_SUB_TOKEN_SIZE = 128
TABLE_5B_SUB_TOKEN_SIZES = {"d_over_64": 8, "d_over_32": 16, "d_over_16": 32, "d_over_8": 64}
TABLE_3_SUB_TOKEN_SIZE = {"llama_7b": 32, "llama_13b": 128}
ADAPTER_ROLES = ("query", "key", "value", "up", "down")
ADAPTER_RANK = 32


def input_bytes(
    shape: LlamaShape, compressed: Collection[str] = (), sub_token_size: int = 1, token_bytes: int = BYTES_OF_ALL_TOKENS
) -> float:
    """The inputs of the counted layers, with `compressed` roles at one number per sub-token. Tables 5b and 6."""
    widths = [shape.width(role) / (sub_token_size if role in compressed else 1) for role in COUNTED_ROLES]
    return shape.num_layers * sum(widths) * token_bytes


def weight_bytes(shape: LlamaShape, bytes_per_block_weight: float) -> float:
    """Frozen weights of Table 3: those of the blocks at the given size, the rest in fp32."""
    hidden, wide = shape.hidden_size, shape.intermediate_size
    block = 4 * hidden**2 + 3 * hidden * wide
    rest = 2 * shape.vocab_size * hidden + (2 * shape.num_layers + 1) * hidden
    return shape.num_layers * block * bytes_per_block_weight + 4 * rest


def adapter_bytes(shape: LlamaShape, rank: int = ADAPTER_RANK, roles: Collection[str] = ADAPTER_ROLES) -> float:
    """LoRA's matrices in bf16, as they fit Table 3."""
    return 2 * shape.num_layers * rank * sum(shape.width(role) + shape.out_width(role) for role in roles)


def table_3_bytes(shape: LlamaShape, bytes_per_block_weight: float, sub_token_size: int | None = None) -> float:
    """One cell of Table 3; with VeLoRA on value and down where a sub-token size is given."""
    compressed = () if sub_token_size is None else ("value", "down")
    inputs = input_bytes(shape, compressed, sub_token_size or 1)
    return weight_bytes(shape, bytes_per_block_weight) + adapter_bytes(shape) + inputs


def accounting(network: nn.Module, num_tokens: int, bytes_per_feature: int) -> Mapping[str, int]:
    """The same accounting for any network and batch: frozen weights, trained weights, inputs of trained counted layers.

    A layer counts if it plays a counted role and trains, or an adapter inside it does. Compressed layers count their codes.
    """
    named = roles_by_module(network)
    inputs = 0
    seen: set[str] = set()
    for path, module in network.named_modules():
        counted = set(named.get(path, "").split("+")) & set(COUNTED_ROLES)
        width = getattr(module, "in_features", getattr(module, "num_features", None))
        weight = getattr(module, "weight", None)
        if not counted or width is None or weight is None or not weight.requires_grad or ".lora_B." in path:
            continue
        assert path not in seen
        seen.add(path)
        kept = module.num_groups if isinstance(module, VeloraTwin) else width
        inputs += num_tokens * kept * bytes_per_feature
    parameters = list(network.parameters())
    codes = [t for layer in int8_layers(network).values() for t in layer.code_tensors()]
    return {
        "frozen weights": unique_bytes(p for p in parameters if not p.requires_grad),
        "trained weights": unique_bytes([*codes, *(p for p in parameters if p.requires_grad)]),
        "inputs of trained layers": inputs,
    }
