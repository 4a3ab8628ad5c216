"""What meter and estimate report: one peak, its terms, its moment, and what each phase of a step used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from velora.memory.timeline import PHASES, Peak, Timeline

SHORT_OF_PHASE = {"load": "after load", "forward": "forward", "backward": "backward", "step": "step"}


@dataclass(frozen=True)
class MemoryFigures:
    """Memory of some training steps, in bytes of storages.

    `peak.terms` are what was alive at the peak and sum to it; `term_peaks` are the most that each term had, at whatever
    time. `by_phase`: the peak inside each phase (null for one that allocated nothing). `saved_bytes`: what backward
    kept at the end of a forward. `device_peaks`, on CUDA: what the allocator itself reports, per phase;
    `unexplained_bytes` is its peak minus ours (rounding, workspaces inside operators). `rss_bytes`: the most that the
    process had resident on the CPU, everything in it included, as sampled when phases change.
    """

    source: Literal["metered", "estimated"]
    device: str
    num_steps: int
    peak: Peak
    by_phase: Mapping[str, Peak | None]
    term_peaks: Mapping[str, int]
    saved_bytes: int
    after_load_bytes: int
    device_peaks: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    unexplained_bytes: int | None = None
    rss_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; the names of result.json's `memory` where they mean the same."""
        return {
            "source": self.source,
            "device": self.device,
            "num_steps": self.num_steps,
            "peak_bytes": self.peak.num_bytes,
            "peak_terms_bytes": self.peak.terms,
            "peak_moment": str(self.peak.moment),
            "peak_by_phase_bytes": {name: peak.num_bytes for name, peak in self.by_phase.items() if peak is not None},
            "after_load_bytes": self.after_load_bytes,
            "weights_bytes": self.term_peaks["weights"],
            "gradients_bytes": self.term_peaks["gradients"],
            "optimizer_bytes": self.term_peaks["optimizer"],
            "saved_for_backward_bytes": self.saved_bytes,
            "device_peaks_bytes": {phase: dict(peaks) for phase, peaks in self.device_peaks.items()},
            "unexplained_bytes": self.unexplained_bytes,
            "rss_bytes": self.rss_bytes,
        }


def figures_of(
    timeline: Timeline,
    source: Literal["metered", "estimated"],
    device: str,
    num_steps: int,
    after_load_bytes: int,
    device_peaks: Mapping[str, Mapping[str, int]] | None = None,
    rss_bytes: int | None = None,
) -> MemoryFigures:
    """Read a timeline that has ended."""
    peak = timeline.peak()
    device_peaks = device_peaks or {}
    allocated = max((peaks["allocated"] for peaks in device_peaks.values()), default=None)
    return MemoryFigures(
        source=source,
        device=device,
        num_steps=num_steps,
        peak=peak,
        by_phase={phase: timeline.peak([phase]) for phase in PHASES},
        term_peaks=timeline.term_peaks(),
        saved_bytes=timeline.saved_bytes,
        after_load_bytes=after_load_bytes,
        device_peaks=device_peaks,
        unexplained_bytes=None if allocated is None else allocated - peak.num_bytes,
        rss_bytes=rss_bytes,
    )
