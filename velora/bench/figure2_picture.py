"""The picture of Figure 2: stable ranks, sparsity of gradients, equation 3, in three panels."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

from velora.bench.figure2 import PRINTED_RANGE
from velora.bench.figure2_measure import equation_3
from velora.report.text import for_figure
from velora.run.files import write_whole

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DRAWN = "group_blocks"  # the reading that panel (a) shows step by step, for its order is the printed one; others: the last step
SHARE_OF_RMS = "0.1"
SPARSITY_GROUPS = ("8", "4", "2")  # sub-tokens of D/8, D/4, D/2
FINE = [i / 500 for i in range(501)]  # k, for a smooth curve


def draw(record: Mapping[str, Any], path: Path) -> None:
    """OSError: not written."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
    _ranks(axes[0], record)
    _sparsity(axes[1], record)
    _equation(axes[2], record)
    for each in axes:
        each.grid(alpha=0.3)
    steps, batch = record["steps"][-1], " x ".join(map(str, next(iter(record["held_out"].values()))))
    title = f"{record['model']} on {record['task']}, {steps} steps, one seed; held-out batch {batch}"
    figure.suptitle(for_figure(title), fontsize=10)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    plt.close(figure)
    write_whole(path, image.getvalue())


def _ranks(axes: Any, record: Mapping[str, Any]) -> None:
    groups = record["groups"]
    axes.axhspan(*PRINTED_RANGE, color="0.93", zorder=0, label="range that the paper prints")
    drawn = record["a"][DRAWN]["stable_rank"]["all"]
    colours = plt.get_cmap("viridis")
    for i, (step, by_groups) in enumerate(drawn.items()):
        colour = colours(i / max(len(drawn) - 1, 1) * 0.9)
        axes.plot(
            groups, [by_groups[str(g)] for g in groups], color=colour, marker="o", markersize=4, label=f"step {step}"
        )
    last = str(record["steps"][-1])
    others = [reading for reading in record["a"] if reading != DRAWN]
    for reading, style in zip(others, (":", "--", "-."), strict=True):
        by_groups = record["a"][reading]["stable_rank"]["all"][last]
        values = [by_groups[str(g)] for g in groups]
        axes.plot(
            groups, values, color="0.4", linestyle=style, linewidth=1, label=f"{for_figure(reading)}, step {last}"
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(groups, [str(g) for g in groups])
    axes.set_ylim(0, None)
    axes.set(xlabel="groups: sub-tokens in a token", ylabel="stable rank, mean over layers")
    axes.set_title(f"(a) layers' inputs; coloured: {for_figure(DRAWN)}", fontsize=10)
    axes.legend(fontsize=7)


def _sparsity(axes: Any, record: Mapping[str, Any]) -> None:
    steps = record["steps"]
    for i, g in enumerate(_shown(record)):
        for kind, style in (("velora", "-"), ("exact", "--")):
            by_step = record["b"][kind][g]
            values = [by_step[str(step)]["rms"][SHARE_OF_RMS] for step in steps]
            axes.plot(steps, values, f"C{i}{style}", marker="o", markersize=3, label=f"S = D/{g}, {kind} gradient")
    axes.set_ylim(0, None)
    axes.set(xlabel="training step", ylabel=f"share of entries below {SHARE_OF_RMS} rms, mean over layers")
    axes.set_title("(b) sparsity of the weight gradients", fontsize=10)
    axes.legend(fontsize=7)


def _equation(axes: Any, record: Mapping[str, Any]) -> None:
    k = record["c"]["k"]
    for i, curve in enumerate(record["c"]["simulated"]):
        colour = str(0.15 + 0.17 * i)
        values = [equation_3(x, curve["sigma"]) for x in FINE]
        axes.plot(FINE, values, color=colour, linewidth=1.2, label=f"equation 3, sigma = {curve['sigma']}")
        axes.plot(k, curve["simulated"], ".", color=colour, markersize=3, label="its simulation" if i == 0 else None)
    for i, g in enumerate(_shown(record)):
        measured = record["c"]["measured_at_the_last_step"][g]
        for kind, style in (("code", "--"), ("pair", ":")):
            label = f"{kind}, S = D/{g}, sigma {measured[kind]['sigma']:.2f}"
            axes.plot(k, measured[kind]["share_above_k"], f"C{i}{style}", label=label)
    axes.set(xlabel="k", ylabel="probability of a move by more than k", ylim=(0, 1.02))
    axes.set_title("(c) moves of similarities; coloured: measured", fontsize=10)
    axes.legend(fontsize=7)


def _shown(record: Mapping[str, Any]) -> list[str]:
    """D/8, D/4 and D/2 where the record has them, else what it has."""
    groups = [str(g) for g in record["groups"]]
    return [g for g in SPARSITY_GROUPS if g in groups] or groups[-3:]
