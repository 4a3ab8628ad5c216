"""The shares of one block, against counts made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from make_memory_block import GRADIENTS, PARTS, STATE, WEIGHTS, block_bytes
from make_memory_summary import main as summarise

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


def test_summary_lists_every_record_beside_the_papers_figure(tmp_path: Path) -> None:
    estimate = {
        "peak_bytes": 3_000_000_000,
        "peak_terms_bytes": {"weights": 1_000_000_000, "gradients": 0, "optimizer": 0, "activations": 2_000_000_000}
        | {"batch": 0, "transient": 0},
        "saved_for_backward_bytes": 2_000_000_000,
    }
    config = {"trainer": {"batch_size": 64, "precision": "bf16"}, "weights": {"dtype": "bf16", "quant_type": "nf4"}}
    record = {
        "name": "a",
        "method": "qlora",
        "model": "m",
        "batch_size": 8,  # of one forward
        "estimate": estimate,
        "paper": {"memory_gb": 2.5},
        "config": config,
    }
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "a.json").write_text(json.dumps({**record, "command": "velora-memory method=qlora"}))
    summarise([str(tmp_path)])
    text = (tmp_path / "README.md").read_text()
    assert "| a | 8 | bf16, weights bf16 and nf4 | 3.00 | 1.00 | 0.00 | 0.00 | 2.00 | 0.00 | 2.00 | 2.5 |" in text
    assert "velora-memory method=qlora" in text


def test_summary_names_the_model_where_a_table_has_several(tmp_path: Path) -> None:
    terms = dict.fromkeys(("weights", "gradients", "optimizer", "activations", "batch", "transient"), 0)
    estimate = {"peak_bytes": 0, "peak_terms_bytes": terms, "saved_for_backward_bytes": 0}
    command = "velora-memory -m experiment=table/full,table/velora model=small,large"
    for model in ("large", "small"):
        for row in ("velora", "full"):
            config = {
                "trainer": {"batch_size": 1, "precision": "fp32"}, "weights": {"dtype": "fp32"},
                "experiment": {"name": f"table/{row}"},
            }  # fmt: skip
            record = {
                "name": row, "method": row, "model": model, "batch_size": 1, "estimate": estimate, "paper": {}, "config": config,
            }  # fmt: skip
            file = tmp_path / "table" / f"{row}_{model}.json"
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps({**record, "command": command}))
    summarise([str(tmp_path)])
    lines = [line for line in (tmp_path / "README.md").read_text().splitlines() if line.startswith("| table/")]
    found = [line.split("|")[1].strip() for line in lines]
    assert found == ["table/full small", "table/full large", "table/velora small", "table/velora large"]
