"""How long one training step takes, and what it keeps: every point of `activations` x `recompute`, in one process.

Networks with random weights get one batch of random words (images) and labels. Before the clock starts each point is checked
once against the first one, exact and nothing computed again: the same loss, the same gradients (of the layers with VeLoRA
another one, by intention), and its bytes are counted: what autograd keeps, each storage once, and the peak of one step. Then
all points are timed in turn. The frontier is what no other point beats in both, time and bytes.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from velora.bench.machine import in_turn, load_average, machine, quartiles
from velora.errors import ConfigError
from velora.report.frontier import frontier

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from velora.config.run import Config

WARM_UP = 2

ACTIVATIONS = {
    "exact": (),
    "velora": ("activations=velora", "activations.layers=[value, down]"),
    "velora_all": ("activations=velora", "activations.layers=[all]"),
}
RECOMPUTE = {
    "": (),
    "+lean": ("recompute=lean",),
    "+mlp": ("recompute=mlp",),
    "+blocks": ("recompute=blocks",),
    "+blocks2": ("recompute=blocks", "recompute.every_n_layers=2"),
    "+checkpoint": ("recompute=blocks", "recompute.lean=false"),  # gradient checkpointing as libraries have it
}
_ALONE = ("velora_all+blocks2", "exact+checkpoint", "velora_all+checkpoint")
_ALL = {a + r: (*ACTIVATIONS[a], *RECOMPUTE[r]) for a in ACTIVATIONS for r in RECOMPUTE}
POINTS = {name: point for name, point in _ALL.items() if name in _ALONE or not name.endswith(("2", "+checkpoint"))}
REFERENCE = "exact"


@dataclass(frozen=True)
class Setting:
    """A network with its batch; `small` is what makes it a matter of minutes on two CPU cores."""

    overrides: tuple[str, ...]
    small: tuple[str, ...] = ()


SETTINGS = {
    "llama_60m": Setting(("model=llama_60m", "task=c4", "trainer.batch_size=32"), ("trainer.batch_size=8",)),
    "roberta_base": Setting(
        ("model=roberta_base", "task=glue/sst2", "task.max_length=64", "trainer.batch_size=64"),
        ("trainer.batch_size=16", "model.architecture.num_hidden_layers=4"),
    ),
    "vit_b16": Setting(
        ("model=vit_b16", "model.pretrained=false", "task=vtab/cifar", "trainer.batch_size=32"),
        ("trainer.batch_size=4", "++model.overrides.depth=4"),
    ),
    "resnet50": Setting(
        ("model=resnet50", "model.pretrained=false", "task=vtab/cifar", "trainer.batch_size=32"),
        ("trainer.batch_size=4",),
    ),
    "llama_tiny": Setting(("model=llama_tiny", "task=manual", "trainer.batch_size=4", "task.max_length=64")),
}
DEFAULT_MODELS = ("llama_60m", "roberta_base", "vit_b16")
WEIGHTS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class Wishes:
    """What is asked for: `repeats` measured rounds, steps with or without the optimiser, more overrides, last."""

    device: torch.device
    dtype_name: str = "float32"
    repeats: int = 9
    with_optimizer: bool = False
    overrides: tuple[str, ...] = ()

    def of(self, model: str) -> list[str]:
        """The overrides that all points of a model share."""
        own = (*SETTINGS[model].overrides, *self.small(model), f"weights.dtype={WEIGHTS[self.dtype_name]}")
        return ["method=full", "trainer.micro_batch_size=null", *own, *self.overrides]

    def small(self, model: str) -> tuple[str, ...]:
        return SETTINGS[model].small if self.device.type == "cpu" else ()


def compare_points(model: str, points: Sequence[str], wishes: Wishes) -> dict[str, Any]:
    """Check, count and time the points of a model, and return the record.

    A point that this model does not offer, or that does not fit, is left out with the reason; ConfigError where not even
    the first one, exact, can be had.
    """
    about = machine(wishes.device)
    candidates, rows, left_out = _prepared(model, dict.fromkeys((REFERENCE, *points)), wishes)
    seconds = in_turn(
        {name: candidate.step for name, candidate in candidates.items()},
        wishes.repeats,
        wishes.device,
        warm_up=WARM_UP,
        tidy=lambda name: candidates[name].free_gradients(),
        on_round=lambda i: _progress(f"{model}: round {i + 1} of {WARM_UP + wishes.repeats}"),
    )
    _progress("")
    first = candidates[REFERENCE]
    return {
        "mode": "step",
        "model": first.config.model.name,
        "task": first.config.task.name,
        "step": "forward, backward and optimiser" if wishes.with_optimizer else "forward and backward",
        "overrides": wishes.of(model),
        "scaled_down": list(wishes.small(model)),
        "batch": {name: list(tensor.shape) for name, tensor in first.batch.items()},
        "parameters": sum(p.numel() for p in first.network.parameters()),
        "dtype": wishes.dtype_name,
        "repeats": wishes.repeats,
        "machine": {**about, "load_average_after": load_average()},
        "points": with_ratios(rows, seconds),
        "left_out": left_out,
    }


def _prepared(
    model: str, points: Iterable[str], wishes: Wishes
) -> tuple[dict[str, Candidate], dict[str, dict[str, Any]], dict[str, str]]:
    """The candidates, what was counted of each, and the reasons why others are left out."""
    import torch

    candidates: dict[str, Candidate] = {}
    rows: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    gradients: dict[str, Tensor] = {}
    for name in points:
        _progress(f"{model}: {name} is built and counted")
        try:
            candidate = Candidate.build([*wishes.of(model), *POINTS[name]], wishes)
            rows[name] = {"overrides": list(POINTS[name]), **candidate.counted(gradients)}
            candidates[name] = candidate
        except (ConfigError, torch.OutOfMemoryError) as error:
            if name == REFERENCE:
                raise ConfigError(f"step {model}: {error}") from None
            left_out[name] = " ".join(str(error).split())
    return candidates, rows, left_out


@dataclass
class Candidate:
    """The network of one point, ready to train, its batch and its loss."""

    config: Config
    network: nn.Module
    batch: dict[str, Tensor]
    forward: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer | None

    @classmethod
    def build(cls, overrides: Sequence[str], wishes: Wishes) -> Candidate:
        import torch

        from velora.config.compose import compose
        from velora.memory.meter import network_without_weights, random_batch, training_loss

        config = compose(*overrides)
        network = network_without_weights(config).to(wishes.device).train()  # seeded: all points have the same weights
        batch = random_batch(config, network)
        torch.manual_seed(0)
        config.activations.calibrate(network, [batch])
        optimizer = config.optimizer.build(network, config) if wishes.with_optimizer else None
        return cls(config, network, batch, training_loss(network, batch, config), optimizer)

    def step(self) -> None:
        self.forward().backward()
        if self.optimizer is not None:
            self.optimizer.step()

    def free_gradients(self) -> None:
        self.network.zero_grad()

    def counted(self, reference: dict[str, Tensor]) -> dict[str, Any]:
        """Loss, difference of the gradients to `reference` (filled if it is empty), and bytes; before any step was taken."""
        import torch

        from velora.memory.ledger import measure_saved_bytes

        torch.manual_seed(0)  # all points draw the same dropout
        loss = self.forward()
        loss.backward()
        found = {name: p.grad for name, p in self.network.named_parameters() if p.grad is not None}
        if not reference:
            reference.update({name: gradient.clone() for name, gradient in found.items()})
        figures: dict[str, Any] = {
            "loss": loss.item(),
            "gradients_differ": _differences(found, reference, self.network),
        }
        del loss, found
        self.free_gradients()
        figures["saved_for_backward_bytes"] = measure_saved_bytes(self.forward)
        figures |= self._peak()
        self.free_gradients()
        gc.collect()
        return figures

    def _peak(self) -> dict[str, Any]:
        """Of one step, with the optimiser's state in place where there is one (its second step; the weights have changed then)."""
        from velora.memory.meter import Meter

        meter = Meter(self.network)
        with meter.measuring(self.optimizer):
            meter.timeline.register("batch", self.batch.values())
            for _ in range(1 if self.optimizer is None else 2):
                loss = self.forward()
                meter.timeline.forward_ended(loss)
                loss.backward()
                del loss
                if self.optimizer is not None:
                    self.optimizer.step()
                    meter.timeline.settle()
                self.free_gradients()
        peak = meter.figures.peak
        return {"peak_bytes": peak.num_bytes, "peak_terms_bytes": dict(peak.terms), "peak_moment": str(peak.moment)}


def _differences(found: Mapping[str, Tensor], reference: Mapping[str, Tensor], network: nn.Module) -> dict[str, float]:
    """The largest deviation of a gradient over its largest entry: of weights with VeLoRA, and of all other parameters."""
    from velora.nn.apply import velora_layers

    ours = {f"{name}.weight" for name in velora_layers(network)}
    worst = {"with_velora": 0.0, "elsewhere": 0.0}
    for name, gradient in found.items():
        right = reference[name].float()
        relative = ((gradient.float() - right).abs().max() / right.abs().max().clamp_min(1e-30)).item()
        kind = "with_velora" if name in ours else "elsewhere"
        worst[kind] = max(worst[kind], relative)
    return worst


def with_ratios(rows: Mapping[str, dict[str, Any]], seconds: Mapping[str, list[float]]) -> dict[str, dict[str, Any]]:
    """The points with their times, and each figure over that of the first point."""
    first = rows[REFERENCE]
    base = median(seconds[REFERENCE])
    points = {
        name: {
            **row,
            "loss_difference": row["loss"] - first["loss"],
            "median_seconds": median(seconds[name]),
            "quartiles_seconds": quartiles(seconds[name]),
            "time_ratio": median(seconds[name]) / base,
            "bytes_ratio": row["saved_for_backward_bytes"] / first["saved_for_backward_bytes"],
            "peak_ratio": row["peak_bytes"] / first["peak_bytes"],
        }
        for name, row in rows.items()
    }
    best = frontier({name: (point["time_ratio"], point["bytes_ratio"]) for name, point in points.items()})
    return {name: {**point, "on_frontier": name in best} for name, point in points.items()}


def table(record: Mapping[str, Any]) -> str:
    """The record as plain text."""
    heads = ["", "time / exact", "seconds", "quartiles", "saved / exact", "saved MiB", "peak / exact", "loss - exact"]
    lines = [[*heads, "frontier"]]
    for name, point in record["points"].items():
        low, high = point["quartiles_seconds"]
        numbers = [f"{point['time_ratio']:.2f}", f"{point['median_seconds']:.3f}", f"{low:.3f} {high:.3f}"]
        numbers += [f"{point['bytes_ratio']:.2f}", f"{point['saved_for_backward_bytes'] / 2**20:.1f}"]
        numbers += [f"{point['peak_ratio']:.2f}", f"{point['loss_difference']:.1e}"]
        lines.append([name, *numbers, "*" if point["on_frontier"] else ""])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]
    texts += [f"left out: {name}: {why}" for name, why in record["left_out"].items()]
    return "\n".join([title(record), *texts])


def title(record: Mapping[str, Any]) -> str:
    """What was measured, and where."""
    about = record["machine"]
    shape = " x ".join(map(str, next(iter(record["batch"].values()))))
    words = [f"{record['model']}, batch {shape}", f"{record['parameters'] / 1e6:.1f} million parameters"]
    words += [record["dtype"], f"{record['step']}; {about['device']}", f"{about['threads']} threads"]
    return ", ".join([*words, f"torch {about['torch']}; medians of {record['repeats']} rounds in turn"])


def _progress(text: str) -> None:
    """On a terminal, the line of what is being done; gone in the end."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
