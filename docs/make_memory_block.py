"""Where the memory of one LLaMA block goes, and which axis takes it away: the picture of docs/memory.md.

    python docs/make_memory_block.py docs/memory_block.png [overrides]

A block's share is what a network of two blocks uses more than one of one block, term by term; so embedding, head and loss drop
out, and nothing is assumed about what a block consists of. What is transient does not add up over blocks and is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from velora.config.compose import compose
from velora.config.run import Config
from velora.memory.estimate import estimate, pretend
from velora.memory.ledger import MASK, REGION, Entry, take_ledger
from velora.nn.twin import CODES

COLUMNS = {
    "full": ("method=full",),
    "galore": ("method=galore",),
    "lora": ("method=lora",),
    "qlora": ("method=qlora",),
    "qlora, lean": ("method=qlora", "recompute=lean"),
    "velora": ("method=velora",),
    "velora_all": ("method=velora_all",),
    "full, lean": ("method=full", "recompute=lean"),
    "velora_all, mlp": ("method=velora_all", "recompute=mlp"),
    "velora_all, blocks": ("method=velora_all", "recompute=blocks"),
}
SETTING = ("task=c4", "model=llama_7b", "task.max_length=512", "trainer.batch_size=16", "weights.dtype=bf16")
WEIGHTS, GRADIENTS, STATE = "weights [weights]", "gradients [adapter]", "optimizer state [optimizer]"
PARTS = {  # in brackets the axis that takes it away
    "inputs of linear layers": "inputs of linear layers [activations: velora; recompute: lean]",
    "codes": "VeLoRA's codes in their place",
    "masks": "dropout masks of LoRA [recompute: lean]",
    "attention": "attention: q, k, v, output [recompute: blocks]",
    "swiglu": "SwiGLU [recompute: lean, mlp]",
    "norms": "norms [recompute: lean]",
    "regions": "checkpointed block's input",
    "others": "others",
}
NAMED_TERMS = {CODES: "codes", MASK: "masks", REGION: "regions"}


def main(argv: Sequence[str]) -> None:
    from velora.memory.tables import columns_table, draw_columns

    path, *overrides = argv
    columns = {name: block_bytes([*SETTING, *own, *overrides]) for name, own in COLUMNS.items()}
    title = "one block of LLaMA-7B, 16 x 512 tokens, bf16"
    draw_columns(columns, Path(path), title)
    from rich.console import Console

    Console(width=250).print(columns_table(columns, f"{title}, MiB"))


def block_bytes(overrides: Sequence[str]) -> dict[str, int]:
    """Bytes of one block of a LLaMA configuration by part."""
    two, one = (_parts(compose(*overrides, f"model.architecture.num_hidden_layers={n}")) for n in (2, 1))
    return {part: two[part] - one.get(part, 0) for part in two if two[part] != one.get(part, 0)}


def _parts(config: Config) -> dict[str, int]:
    def part(entry: Entry) -> str:
        kinds = {holder.kind for holder in entry.holders}
        if entry.term in NAMED_TERMS:
            return PARTS[NAMED_TERMS[entry.term]]
        if any("Attention" in kind for kind in kinds):
            return PARTS["attention"]
        if any("Norm" in kind for kind in kinds):
            return PARTS["norms"]
        if any("MLP" in kind or "SiLU" in kind for kind in kinds):
            return PARTS["swiglu"]
        return PARTS["inputs of linear layers" if all(holder.role for holder in entry.holders) else "others"]

    figures, pretended = estimate(config), pretend(config)
    with pretended.context():
        ledger = take_ledger(pretended.network, pretended.losses[0])
    peaks: Mapping[str, int] = figures.term_peaks
    found = {WEIGHTS: peaks["weights"], GRADIENTS: peaks["gradients"], STATE: peaks["optimizer"]}
    found |= dict.fromkeys(PARTS.values(), 0)
    for entry in ledger.entries:
        found[part(entry)] += entry.num_bytes
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
