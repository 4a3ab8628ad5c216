"""Ten steps of every method, as they were when this file was written: a change of the loop or of a method that nobody meant shows.

`python tests/test_curves.py` writes the losses anew, for a change that was meant; the commit says why.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from loop_helpers import LLAMA, config_of, steps_of, train, write_texts

FILE = Path(__file__).parent / "curves.json"
METHODS = (
    "full", "linear_probe", "lora", "qlora", "ssf", "hydra", "galore", "grass", "flora", "velora", "velora_all",
    "lora_velora", "qlora_velora", "ssf_velora", "hydra_velora", "multilora", "multilora_velora", "qpissa", "grass_velora",
    "grass_velora_factored", "q_galore", "q_galore_velora", "lte", "lte_velora", "checkpoint",
)  # fmt: skip


def losses(method: str, folder: Path) -> list[float]:
    config = config_of(
        folder / method, *LLAMA[1:], "task=c4", "task.folder=short", f"data.root={write_texts(folder)}", f"method={method}",
        "trainer.max_steps=10", "trainer.learning_rate=1e-2", "trainer.schedule=cosine", "trainer.warmup_steps=2",
        *(["activations.sub_token_size=16"] if method == "ssf_velora" else []),
    )  # fmt: skip
    train(config)
    return [line["loss"] for line in steps_of(config)]


@pytest.mark.parametrize("method", METHODS)
def test_ten_steps(method: str, tmp_path: Path) -> None:
    # fp32 on another processor sums in another order, which ten steps of AdamW make larger
    assert losses(method, tmp_path) == pytest.approx(json.loads(FILE.read_text())[method], rel=2e-3)


if __name__ == "__main__":
    import tempfile

    sys.path.insert(0, str(Path(__file__).parent))
    with tempfile.TemporaryDirectory() as folder:
        FILE.write_text(json.dumps({m: losses(m, Path(folder)) for m in METHODS}, indent=1) + "\n")
