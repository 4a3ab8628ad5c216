"""What cannot be combined with `trainer.sharding=fsdp`, where each process holds a part of every parameter.

`docs/troubleshooting.md` says what is sharded and what the record then counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from velora.config.processes import num_processes

if TYPE_CHECKING:
    from velora.config.run import Config


def sharding_problems(config: Config) -> Iterator[str]:
    """Sentences on what cannot be sharded, or would not be."""
    trainer = config.trainer
    if trainer.sharding == "none":
        return
    given = f"trainer.sharding={trainer.sharding}"
    if num_processes() == 1:
        yield (
            f"{given} has no effect in one process; start the run with torchrun --nproc-per-node N, or set "
            "trainer.sharding=none"
        )
    if trainer.max_steps == 0:
        yield f"{given} has no effect with trainer.max_steps=0, which trains nothing; set trainer.sharding=none"
    elif config.task.evaluates_alone:
        yield (
            f"task={config.task.name} with {given}: its benchmark needs a whole network in each process; train with another task "
            "and trainer.save_model=true, then give model.path=<run>/model to task=mmlu"
        )
    if config.weights.quantised:
        yield (
            f"weights={config.weights.kind} with {given}: a weight in four bits and its scales cannot be cut into shards; use "
            "weights=dense, or trainer.sharding=none"
        )
    if not config.optimizer.takes_shards:
        yield (
            f"optimizer={config.optimizer.kind} with {given}: it needs whole parameters and gradients, of which each process holds "
            "a part; use optimizer=adamw, or trainer.sharding=none"
        )
    if trainer.precision == "fp16":
        yield (
            f"trainer.precision=fp16 with {given}: the loss scale would have to follow the overflows of all shards, which is not "
            "supported; use trainer.precision=bf16 or fp32"
        )
    if trainer.compile:
        yield f"trainer.compile=true with {given} is not supported; set trainer.compile=false or trainer.sharding=none"
