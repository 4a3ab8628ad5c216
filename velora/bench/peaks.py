"""The estimate of velora-memory against what the device used, over models, methods, what is computed again, and batch sizes."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from itertools import cycle
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from velora.memory.timeline import MemoryFigures

Setting = tuple[str, ...]

RECOMPUTE = ("none", "lean", "blocks")
GRID: list[tuple[Setting, tuple[str, ...], tuple[int, ...]]] = [  # a network and its task, methods, batch sizes in turn
    (("model=llama_60m", "task=c4"), ("full", "velora_all", "galore", "lora_velora"), (8, 32)),
    (("model=roberta_base", "task=glue/sst2", "task.max_length=128"), ("full", "velora", "lora"), (16, 48)),
    (("model=vit_b16", "model.pretrained=false", "task=vtab/cifar"), ("full", "ssf_velora", "hydra"), (16, 64)),
    (("model=llama_130m", "task=c4", "weights.dtype=bf16"), ("qlora_velora", "velora_all"), (8, 16)),
    (("model=llama_60m", "task=c4", "trainer.precision=bf16"), ("full", "velora_all"), (16, 32)),
]
TINY: list[tuple[Setting, tuple[str, ...], tuple[int, ...]]] = [
    (("model=llama_tiny", "task=manual", "task.max_length=32"), ("full", "velora_all"), (2, 4)),
    (("model=vit_tiny", "task=digits"), ("full",), (2,)),
]


def settings(tiny: bool = False) -> Iterator[Setting]:
    """Overrides of one setting each."""
    for network, methods, batch_sizes in TINY if tiny else GRID:
        sizes = cycle(batch_sizes)
        for method in methods:
            for recompute in RECOMPUTE:
                batch = f"trainer.batch_size={next(sizes)}"
                yield (f"method={method}", *network, batch, "trainer.micro_batch_size=null", f"recompute={recompute}")


def compare_peaks(setting: Setting, device: torch.device) -> dict[str, Any]:
    """Estimated and measured peak of two training steps, and the estimate's relative error.

    Measured is the allocator's own peak, less what was allocated before; on a CPU, which has none, that of the meter.
    """
    from velora.config.compose import compose
    from velora.memory.estimate import estimate
    from velora.memory.meter import measure

    config = compose(*setting, f"trainer.device={device.type}")
    estimated = estimate(config, device="cuda" if device.type == "cuda" else "cpu")
    gc.collect()
    before = _allocated(device)
    measured = measure(config)
    peak = _allocators_peak(measured) - before
    return {
        "overrides": list(setting),
        "estimated_bytes": estimated.peak.num_bytes,
        "measured_bytes": peak,
        "relative_error": estimated.peak.num_bytes / peak - 1,
        "estimated_moment": str(estimated.peak.moment),
        "estimated": estimated.to_json(),
        "measured": measured.to_json(),
    }


def make_workspaces(device: torch.device) -> None:
    """Have the libraries allocate what they keep, so that no setting is charged with it."""
    import torch

    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(64, 64, device=device, dtype=dtype, requires_grad=True)
        (x @ x).sum().backward()


def summary(rows: list[dict[str, Any]]) -> str:
    """One sentence over all settings."""
    errors = sorted(abs(row["relative_error"]) for row in rows)
    worst = max(rows, key=lambda row: abs(row["relative_error"]))
    where = f"{worst['relative_error']:+.1%} at worst ({' '.join(worst['overrides'])})"
    return f"{len(rows)} settings: the estimate is off by {median(errors):.1%} in the median, by {where}"


def _allocators_peak(figures: MemoryFigures) -> int:
    return max((peaks["allocated"] for peaks in figures.device_peaks.values()), default=figures.peak.num_bytes)


def _allocated(device: torch.device) -> int:
    import torch

    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
