"""Figure 2 of the paper: why rank-1 projections of sub-tokens may work, measured while networks train.

    (a) the stable rank of the layers' inputs, against the number of groups, as training goes on
    (b) the sparsity of the weight gradients, for sub-tokens of D/8, D/4 and D/2
    (c) equation 3, the probability that a similarity moves by more than k

One network is trained for each number of groups, by velora's own loop, and measured before the first step and at five
equally spaced ones, on a batch of the validation set. What is measured, and what the paper leaves open:
velora/bench/figure2_measure.py. The paper prints stable ranks of about 6 to 18, higher for more groups; the record says of each
reading whether it has that.

    G  groups: sub-tokens in a token
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from pydantic import PrivateAttr
from torch import Tensor, nn

from velora.bench.figure2_measure import K_GRID, MOVEMENTS, NUM_PAIRS, READINGS, THRESHOLDS, measure, simulated
from velora.bench.machine import load_average, machine
from velora.config.activations import Velora
from velora.config.compose import compose
from velora.config.run import Config
from velora.errors import ConfigError
from velora.memory.meter import network_without_weights, training_loss
from velora.nn.apply import velora_layers
from velora.nn.projection import split_width
from velora.run.device import training_device
from velora.run.run import train

GROUPS = (1, 2, 4, 8, 16)
SIGMAS = (0.1, 0.25, 0.5, 1.0)
PRINTED_RANGE = (6, 18)
NUM_INTERVALS = 5
SMALL = ("model=llama_tiny", "task=manual", "trainer.batch_size=4")
OWN = (
    "activations.num_groups", "activations.sub_token_size", "trainer.max_steps", "runs_dir", "name", "resume", "overwrite",
)  # fmt: skip
"""Keys that the figure sets itself."""


def figure2(
    overrides: Sequence[str], *, groups: Sequence[int] = GROUPS, steps: int = 1000, device: torch.device | None = None
) -> dict[str, Any]:
    """Train and measure a network for each number of groups, and return the record.

    Without a model and a task among the overrides of velora-train it is the small level: llama_tiny on the embedded text.
    `device`: None for what trainer.device says. Raises ConfigError before any training, RunError where a network diverges.
    """
    shared = _shared(overrides, steps, device)
    configs = _configs(shared, groups)
    held_out = _held_out(configs[groups[0]])
    at = sorted({round(steps * i / NUM_INTERVALS) for i in range(NUM_INTERVALS + 1)})
    about = machine(training_device(configs[groups[0]]))
    networks = []
    for number, (g, config) in enumerate(configs.items()):
        print(f"figure2: network {number + 1} of {len(groups)}, {g} groups, {steps} steps", file=sys.stderr, flush=True)
        networks.append(_trained(config, g, at, held_out))
    config = configs[groups[0]]
    return {
        "mode": "figure2",
        "level": "small" if "task=manual" in shared and "model=llama_tiny" in shared else None,
        "model": config.model.name, "task": config.task.name, "overrides": list(shared), "seed": config.seed,
        "groups": list(groups), "steps": at, "device": networks[0]["device"],
        "held_out": {name: list(tensor.shape) for name, tensor in held_out.items()},
        "machine": {**about, "load_average_after": load_average()},
        "definitions": {"readings": READINGS, "movements": MOVEMENTS, "sparsity_thresholds": THRESHOLDS},
        "pairs_a_layer": NUM_PAIRS,
        **_short({"a": panel_a(networks), "b": panel_b(networks), "c": panel_c(networks), "networks": _kept(networks)}),
    }  # fmt: skip


def _kept(networks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The networks with the stable ranks of each layer; the rest of what was measured stands in the panels."""
    wanted = ("role", "width", "stable_rank")
    return [
        {**network, "measured": {
            step: {name: {key: layer[key] for key in wanted} for name, layer in at_step["layers"].items()}
            for step, at_step in network["measured"].items()
        }}
        for network in networks
    ]  # fmt: skip


def _short(value: Any) -> Any:
    """Every float with six digits."""
    if isinstance(value, Mapping):
        return {key: _short(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_short(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _shared(overrides: Sequence[str], steps: int, device: torch.device | None) -> tuple[str, ...]:
    """The overrides that all networks share."""
    keys = {override.lstrip("+~").partition("=")[0] for override in overrides}
    if taken := [key for key in OWN if key in keys]:
        raise ConfigError(
            f"figure2 sets {', '.join(taken)} itself; leave it out (--groups and --steps are the options)"
        )
    small = () if keys & {"model", "task"} else SMALL
    where = () if device is None else (f"trainer.device={device.type}",)
    method = () if "method" in keys else ("method=velora",)
    return (*method, *small, *overrides, f"trainer.max_steps={steps}", *where)


def _configs(shared: Sequence[str], groups: Sequence[int]) -> dict[int, Config]:
    """Groups -> configuration; ConfigError before any training, also for layers that do not split."""
    plain = compose(*shared)
    if not isinstance(plain.activations, Velora):
        raise ConfigError(
            f"activations={plain.activations.kind}: figure2 measures VeLoRA layers; use activations=velora"
        )
    apart = ("trainer.save_every=end", "trainer.eval_every=end", "trainer.measure_memory=false", "wandb.mode=disabled")
    configs = {}
    for g in groups:
        own = (f"activations.num_groups={g}", "activations.sub_token_size=null", "resume=never", f"name=figure2/{g}")
        configs[g] = compose(*apart, *shared, *own)
    if len(configs) > 1:
        layers = velora_layers(network_without_weights(configs[groups[0]]))
        for width in {layer.num_groups * layer.sub_token_size for layer in layers.values()}:
            for g in groups:
                split_width(width, num_groups=g)
    return configs


def _held_out(config: Config) -> dict[str, Tensor]:
    """The first batch of the validation set, of trainer.eval_batch_size examples."""
    data = config.task.load(config.model.preprocessor(config), config)
    if len(data.phases) > 1:
        raise ConfigError(
            f"task={config.task.name} trains {len(data.phases)} times in a run; figure2 needs a task that trains once"
        )
    examples = next(iter(data.phases[0].validation.values()))
    return data.collate([examples[i] for i in range(min(config.trainer.eval_batch_size, len(examples)))])


class _Watched(Velora):
    """VeLoRA, with `_look(network)` after the calibration and after each step."""

    _look: Callable[[nn.Module], object] = PrivateAttr()

    def calibrate(self, model: nn.Module, batches: Iterable[dict[str, Any]]) -> None:
        super().calibrate(model, batches)
        self._look(model)

    def after_step(self, model: nn.Module) -> None:
        super().after_step(model)
        self._look(model)


def _trained(config: Config, num_groups: int, at: Sequence[int], held_out: Mapping[str, Tensor]) -> dict[str, Any]:
    """Train one network, and measure it before the first step and at each of `at`."""
    measured: dict[str, Any] = {}
    step = -1

    def look(network: nn.Module) -> None:
        nonlocal step
        step += 1
        if step in at:
            device = next(network.parameters()).device
            batch = {name: tensor.to(device) for name, tensor in held_out.items()}
            measured[str(step)] = measure(network, batch, training_loss(network, batch, config))
            config.activations.forget(network)

    watched = _Watched.model_construct(**dict(config.activations))
    watched._look = look
    with tempfile.TemporaryDirectory(prefix="velora-figure2-") as folder, contextlib.redirect_stdout(sys.stderr):
        record = train(config.model_copy(update={"activations": watched, "runs_dir": Path(folder)}))
    return {
        "num_groups": num_groups, "metrics": record["metrics"], "speed": record["speed"], "device": record["device"],
        "measured": measured,
    }  # fmt: skip


def _by_role(layers: Mapping[str, Any], value: Callable[[Any], float]) -> dict[str, float]:
    """The mean over the layers of each role, and over all."""
    roles = dict.fromkeys(str(layer["role"]) for layer in layers.values())
    means = {role: fmean(value(x) for x in layers.values() if str(x["role"]) == role) for role in roles}
    return {**means, "all": fmean(map(value, layers.values()))}


def panel_a(networks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Reading -> role -> step -> groups -> stable rank, a mean over layers; and whether it has what the paper prints."""
    found: dict[str, Any] = {}
    for reading in READINGS:
        values: dict[str, dict[str, dict[str, float]]] = {}
        for network in networks:
            for step, at_step in network["measured"].items():
                means = _by_role(at_step["layers"], lambda layer, r=reading: layer["stable_rank"][r])  # type: ignore[misc]
                for role, mean in means.items():
                    values.setdefault(role, {}).setdefault(step, {})[str(network["num_groups"])] = mean
        found[reading] = {"stable_rank": values, "verdict": {role: verdict(x) for role, x in values.items()}}
    return found


def verdict(by_step: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Of step -> groups -> rank: at which steps it rises from each number of groups to the next, and its range beside the
    printed one."""
    everything = [value for by_groups in by_step.values() for value in by_groups.values()]
    rises: dict[str, bool | None] = {}  # None: there is one number of groups
    for step, by_groups in by_step.items():
        ordered = [by_groups[g] for g in sorted(by_groups, key=int)]
        rises[step] = all(a < b for a, b in pairwise(ordered)) if len(ordered) > 1 else None
    low, high = min(everything), max(everything)
    return {
        "rises_with_groups": rises, "range": [low, high],
        "within_printed_range": PRINTED_RANGE[0] <= low and high <= PRINTED_RANGE[1],
    }  # fmt: skip


def panel_b(networks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Gradient -> groups -> step -> threshold -> share of small entries, a mean over layers."""
    found: dict[str, Any] = {"velora": {}, "exact": {}}
    for network in networks:
        for kind, by_groups in found.items():
            by_groups[str(network["num_groups"])] = {
                step: {
                    of: {
                        str(t): fmean(layer["sparsity"][kind][of][str(t)] for layer in at_step["layers"].values())
                        for t in fractions
                    }
                    for of, fractions in THRESHOLDS.items()
                }
                for step, at_step in network["measured"].items()
            }
    return found


def panel_c(networks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Equation 3 beside squares of normal numbers, and beside what the last step's inputs do, by groups."""
    last = {str(network["num_groups"]): list(network["measured"].values())[-1]["movements"] for network in networks}
    return {"k": list(K_GRID), "simulated": simulated(SIGMAS), "measured_at_the_last_step": last}


def table(record: Mapping[str, Any]) -> str:
    """The record as plain text: at the last step, by the number of groups."""
    groups, last = [str(g) for g in record["groups"]], str(record["steps"][-1])
    lines = [["groups", *groups, "rises at", "within 6 to 18"]]
    for reading, found in record["a"].items():
        for role, by_step in found["stable_rank"].items():
            said = found["verdict"][role]
            rises = f"{sum(filter(None, said['rises_with_groups'].values()))} of {len(record['steps'])} steps"
            name = f"stable rank, {reading}, {role}"
            inside = "yes" if said["within_printed_range"] else "no"
            lines.append([name, *(f"{by_step[last][g]:.2f}" for g in groups), rises, inside])
    for kind, by_groups in record["b"].items():
        values = (by_groups[g][last]["rms"]["0.1"] for g in groups)
        lines.append([f"entries below 0.1 rms, {kind} gradient", *(f"{x:.3f}" for x in values), "", ""])
    for kind in MOVEMENTS:
        values = (record["c"]["measured_at_the_last_step"][g][kind]["largest_difference_to_equation"] for g in groups)
        lines.append([f"off equation 3, {kind}", *(f"{x:.3f}" for x in values), "", ""])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    head = f"{record['model']} on {record['task']}, step {last}"
    return "\n".join(
        [head, *("  ".join([x[0].ljust(widths[0]), *map(str.rjust, x[1:], widths[1:])]).rstrip() for x in lines)]
    )
