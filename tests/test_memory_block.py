"""The shares of one block, against counts made by hand."""

from __future__ import annotations

import pytest
from make_memory_block import GRADIENTS, PARTS, STATE, WEIGHTS, block_bytes

SIZES = ["hidden_size=64", "intermediate_size=128", "num_attention_heads=4", "num_key_value_heads=4"]
SETTING = ["task=manual", "model=llama_tiny", "task.max_length=128", "trainer.batch_size=4"]
SETTING += [f"model.architecture.{size}" for size in SIZES]
NUM_TOKENS, HIDDEN, WIDE, FLOAT = 4 * 128, 64, 128, 4
NUM_WEIGHTS = 4 * HIDDEN**2 + 3 * HIDDEN * WIDE + 2 * HIDDEN


@pytest.fixture(scope="module")
def full() -> dict[str, int]:
    return block_bytes([*SETTING, "method=full"])


def test_a_block_of_full_training(full: dict[str, int]) -> None:
    found = full
    # allocations for CUDA are multiples of 512 bytes: the two norms' weights (256 bytes) take twice their size
    assert found[WEIGHTS] == found[GRADIENTS] == NUM_WEIGHTS * FLOAT + 2 * 256
    assert found[STATE] == pytest.approx(2 * found[WEIGHTS], rel=0.05)  # and a step counter of 512 bytes per tensor
    assert found[PARTS["inputs of linear layers"]] == NUM_TOKENS * (2 * HIDDEN + WIDE) * FLOAT
    assert found[PARTS["swiglu"]] == NUM_TOKENS * 3 * WIDE * FLOAT  # SiLU's input, its output, up's output
    num_heads = 4
    assert found[PARTS["attention"]] == NUM_TOKENS * (4 * HIDDEN + num_heads) * FLOAT  # q, k, v, output, log-sum-exp
    assert found[PARTS["norms"]] == NUM_TOKENS * 2 * (2 * HIDDEN + 1) * FLOAT  # input, normalised, reciprocal root


def test_each_method_takes_away_its_own_part(full: dict[str, int]) -> None:
    lora, velora = (block_bytes([*SETTING, f"method={m}"]) for m in ("lora", "velora_all"))
    inputs = PARTS["inputs of linear layers"]
    assert lora[GRADIENTS] < 0.3 * full[GRADIENTS]
    assert inputs not in velora
    assert (
        velora[PARTS["codes"]] == NUM_TOKENS * (3 * HIDDEN + WIDE) * FLOAT // 16
    )  # one for q, k and v, one for gate and up
    for part in (PARTS["swiglu"], PARTS["norms"], PARTS["attention"]):
        assert full[part] == velora[part]


def test_lean_keeps_what_norms_and_swiglu_read(full: dict[str, int]) -> None:
    lean, mlp = (block_bytes([*SETTING, "method=full", f"recompute={level}"]) for level in ("lean", "mlp"))
    assert PARTS["inputs of linear layers"] not in lean
    assert lean[PARTS["swiglu"]] == NUM_TOKENS * 2 * WIDE * FLOAT
    assert lean[PARTS["norms"]] == NUM_TOKENS * 2 * (HIDDEN + 1) * FLOAT
    assert lean[PARTS["attention"]] == mlp[PARTS["attention"]] == full[PARTS["attention"]]
    assert PARTS["swiglu"] not in mlp
    assert mlp[PARTS["norms"]] == lean[PARTS["norms"]]
