"""VeLoRA on a model: choose layers, set their directions on the first batch, move them, and take it off again.

    summary = apply_velora(model, ["value", "down"], sub_token_size=16)
    calibrate(model, batch)          # one forward without gradient (several batches, several), before the first step
    ...training...                   # any loop; update_directions(model) after each step for a running average
    remove_velora(model)             # plain layers again

The layers' classes change, and nothing else: parameters, hooks and the optimizer that refers to them stay.
"""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from velora.config.roles import ROLES, Roles, matches, role_of, roles_of
from velora.errors import ConfigError
from velora.nn.projection import INITS, SubTokenStatistics, split_width
from velora.nn.swap import (
    can_be_twin,
    expand_container,
    find_modules,
    module_names,
    plain_name,
    raise_problems,
    twin_of,
    twin_problems,
    variant_problems,
    width_of,
)
from velora.nn.twin import VeloraTwin

Size = int | Mapping[str, int] | None


@dataclass(frozen=True)
class VeloraLayer:
    """One layer: D = `width` features in `num_groups` sub-tokens of `sub_token_size`. A fused layer has roles joined by +."""

    name: str
    role: str | None
    width: int
    num_groups: int
    sub_token_size: int


@dataclass(frozen=True)
class VeloraSummary:
    """What apply_velora did, layer by layer in the model's order; as text, one line per kind of layer."""

    layers: tuple[VeloraLayer, ...]

    def __str__(self) -> str:
        counts: dict[tuple[str, int, int, int], int] = {}
        for layer in self.layers:
            key = (layer.role or layer.name, layer.width, layer.num_groups, layer.sub_token_size)
            counts[key] = counts.get(key, 0) + 1
        rows: list[tuple[str, ...]] = [("VeLoRA on", "layers", "width", "num_groups", "sub_token_size")]
        rows += [(role, str(count), *map(str, sizes)) for (role, *sizes), count in counts.items()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [[cell.rjust(w) for cell, w in zip(row, widths, strict=True)] for row in rows]
        return "\n".join("  ".join([row[0].ljust(widths[0]), *line[1:]]) for row, line in zip(rows, lines, strict=True))


@dataclass(frozen=True)
class _Chosen:
    """A module that is to become a twin, under its name and by the entries of `layers` that chose it."""

    name: str
    module: nn.Module
    entries: tuple[str, ...]
    role: str | None


def apply_velora(
    model: nn.Module,
    layers: str | Sequence[str],
    *,
    num_groups: Size = None,
    sub_token_size: Size = None,
    init: str = "fixed_average",
    scale: float = 1.0,
    roles: Roles | None = None,
    seed: int = 0,
) -> VeloraSummary:
    """Make chosen layers VeLoRA layers, in place, so that they keep N G numbers for backward in place of N D.

    Args:
        layers: roles ("value", "down"; see velora/config/roles.py), "all" for every role that the architecture has, or glob
            patterns of module names. A chosen module that holds an adapter (PEFT's LoRA, SSF, Hydra) stands for its layers.
        num_groups, sub_token_size: G or S = D / G, exactly one; a number, or one per entry of `layers` or role.
        init: where the direction comes from. "fixed_average" (the paper's best): normalised mean of the calibration
            batch's sub-tokens. "svd": their first right singular vector. "running_average": a mean that follows the
            training, with update_directions(model) after each step. "random": from `seed`, without data.
        scale: factor on the weight gradients of these layers (the authors' velora_scale).
        roles: role -> patterns, where the architecture is not in the table or should be read otherwise; else the model's
            attribute `velora_roles`, else the table.

    Call it after adapters are in place and before an FSDP2 or DDP wrapper, and then `calibrate`. Layers whose weight is
    frozen keep nothing of their input anyway: some raise a warning, all an error.

    Raises ConfigError that names all problems: a role or pattern that matches nothing, a layer without a twin, a width
    that does not split, a size that is missing. The model is untouched then.
    """
    entries = [layers] if isinstance(layers, str | nn.Module) else list(layers)
    problems = list(_argument_problems(model, entries, num_groups, sub_token_size, init, scale))
    raise_problems(problems)
    resolved = roles_of(model, roles)
    if "all" in entries and resolved:
        entries = [*resolved, *(entry for entry in entries if entry != "all")]
    chosen = _choose(model, entries, resolved, problems)
    sizes = _fitting_sizes(chosen, num_groups, sub_token_size, problems)
    raise_problems(problems)
    _look_for_frozen(chosen)
    for layer in chosen:
        groups, size = sizes[layer.name]
        layer_seed = zlib.crc32(f"{seed}/{plain_name(layer.name)}".encode())
        twin = twin_of(type(layer.module))
        assert twin is not None
        twin.convert_(layer.module, num_groups=groups, sub_token_size=size, scale=scale, init=init, seed=layer_seed)
    return VeloraSummary(tuple(VeloraLayer(x.name, x.role, math.prod(sizes[x.name]), *sizes[x.name]) for x in chosen))


def velora_layers(model: nn.Module) -> dict[str, VeloraTwin]:
    """Name -> VeLoRA layer, in the model's order; the order is the same on all ranks."""
    return {name: module for name, module in model.named_modules() if isinstance(module, VeloraTwin)}


def remove_velora(model: nn.Module) -> None:
    """Make every VeLoRA layer a plain one again, in place. The parameters stay, the directions go.

    Raises ConfigError for a layer whose class a wrapper (fully_shard) has changed since, or whose forward something
    replaced that has kept the VeLoRA layer's where it cannot be found (accelerate's hooks can).
    """
    layers = velora_layers(model)
    problems = []
    for name, layer in layers.items():
        if twin_of(layer.plain_class) is not type(layer):
            problems.append(f"{name}: {type(layer).__name__} is not a class of velora's; unwrap the model first")
        elif "forward" in vars(layer) and not layer.own_forwards():
            problems.append(f"{name}: its forward was replaced after apply_velora; undo that before remove_velora")
    raise_problems(problems)
    for layer in layers.values():
        layer.revert_()


@torch.no_grad()
def calibrate(model: nn.Module, batch: Any, *more: Any) -> None:
    """Set the direction of every VeLoRA layer from one batch or several, by one forward of each, without gradient.

    The forward runs in the model's present mode (in training mode after dropout, as the layers will see their inputs)
    and leaves no trace: random states (CPU, CUDA, XPU) and buffers are restored, the output is dropped. With
    torch.distributed initialised all ranks must call it, each with its own batch: the directions come from the sub-tokens
    of all. Random directions need no forward. Calling it again computes the directions anew.

    A layer that no forward reaches on any rank (an inactive adapter, an idle expert, a dropped layer) keeps the direction
    that it has. Where it has none it stays plain, with exact gradients and its whole input kept, until a later call
    reaches it; one warning names such layers.

    Args:
        batch, more: what one forward takes, on the model's device: a mapping (keyword arguments), a tuple or list
            (positional arguments), or one argument.

    Raises ConfigError where no layer is reached, and one that names every layer whose input gives no direction; no
    direction is changed then.
    """
    layers = velora_layers(model)
    if not layers:
        raise ConfigError(f"calibrate: {type(model).__name__} has no VeLoRA layer; call apply_velora first")
    if any(layer.weight.is_meta for layer in layers.values()):
        raise ConfigError(
            f"calibrate: {type(model).__name__} is on the meta device and has no values; load its weights first"
        )
    gathered = {name: layer.new_statistics() for name, layer in layers.items() if layer.needs_statistics()}
    if gathered:
        with _observing(layers, gathered), without_a_trace(model), torch.compiler.set_stance("force_eager"):
            for each in (batch, *more):
                _forward(model, each)
        _sum_over_ranks([statistics.flat for statistics in gathered.values()])
    reached = {name: statistics for name, statistics in gathered.items() if statistics.count}
    if gathered and not reached:
        raise ConfigError(
            f"calibrate: no sub-token reached a VeLoRA layer of {type(model).__name__}; give a batch that is not empty, with "
            "the adapters that hold these layers active and not merged"
        )
    directions = _directions(layers, reached)
    for name, layer in layers.items():
        if name in directions:
            layer.set_direction(directions[name], reached[name].mean())
        elif not layer.needs_statistics():
            layer.reset_direction()
    _keep_plain({name: layers[name] for name in gathered if name not in reached and not layers[name].has_direction()})


def _keep_plain(layers: dict[str, VeloraTwin]) -> None:
    for layer in layers.values():
        layer.stay_plain()
    if layers:
        warnings.warn(
            f"calibrate: no batch reached {', '.join(layers)}: these VeLoRA layers stay plain layers until a call of "
            "calibrate reaches them",
            stacklevel=4,
        )


def _directions(layers: dict[str, VeloraTwin], reached: dict[str, SubTokenStatistics]) -> dict[str, Tensor]:
    """A direction for each layer that was reached; one ConfigError names all whose input gives none."""
    directions, problems = {}, []
    for name, statistics in reached.items():
        try:
            directions[name] = layers[name].direction_from(statistics)
        except ConfigError as error:
            problems.append(f"{name}: {error}")
    raise_problems(problems)
    return directions


@torch.no_grad()
def update_directions(model: nn.Module) -> None:
    """Move the running averages by the inputs of the step that ended; call it after optimizer.step(), on all ranks.

    Within a step the directions stay, so that accumulation, recomputation and backward see one direction. Layers with
    another init are left alone, and so are those that have seen inf or NaN on some rank in this step (which a gradient
    scaler skips), with a warning.
    """
    layers = {name: layer for name, layer in velora_layers(model).items() if layer.init == "running_average"}
    taken = {name: layer.take_batch_statistics() for name, layer in layers.items()}
    _sum_over_ranks([statistics.flat for statistics in taken.values()])
    not_finite = [name for name, statistics in taken.items() if not statistics.is_finite()]
    for name, layer in layers.items():
        if name not in not_finite:
            layer.move_average(taken[name])
    if not_finite:
        warnings.warn(
            f"update_directions: inf or NaN in the input of {', '.join(not_finite)}: this step moves no direction there",
            stacklevel=3,
        )


def _argument_problems(
    model: nn.Module, entries: list[Any], groups: Size, size: Size, init: str, scale: float
) -> Iterator[str]:
    if not entries:
        yield "layers is empty: name at least one role or pattern"
    for entry in entries:
        if not isinstance(entry, str):
            name = next((f" ({name!r})" for name, module in model.named_modules() if module is entry and name), "")
            yield (
                f"layers: {type(entry).__name__}: an entry is a role or a glob pattern of module names; give the name of "
                f"the module{name} instead of the module"
            )
    if (groups is None) == (size is None):
        yield f"num_groups={groups} and sub_token_size={size}: give exactly one, the other is derived"
    if init not in INITS:
        yield f"init={init!r} must be one of {', '.join(INITS)}"
    if not (isinstance(scale, int | float) and math.isfinite(scale) and scale > 0):
        yield f"scale={scale!r} must be a positive number"


def _choose(model: nn.Module, entries: list[str], roles: Roles, problems: list[str]) -> list[_Chosen]:
    """The modules to convert, in the model's order, each once; what cannot be converted goes to `problems`."""
    patterns: dict[str, Sequence[str]] = {}
    for entry in entries:
        if entry == "all" and not roles:
            problems.append(
                f"layers: 'all' stands for all roles, and the architecture of {type(model).__name__} is not in "
                "velora/config/roles.py; give roles={'value': ['*.v_proj'], ...} (the key model.roles), or glob patterns "
                "of module names"
            )
        elif entry in roles or entry not in ROLES:
            patterns[entry] = roles.get(entry, [entry])
        else:
            known = (
                f"its roles are {', '.join(roles)}" if roles else "its architecture is not in velora/config/roles.py"
            )
            problems.append(f"{type(model).__name__} has no role {entry!r}: {known}; give roles (the key model.roles)")
    found: dict[str, nn.Module] = {}
    for entry in patterns:
        try:
            found |= find_modules(model, patterns[entry])
        except ConfigError as error:
            problems.append(f"layers: {entry!r}: {error}" if entry in roles else f"layers: {error}")
    order = {name: position for position, name in enumerate(module_names(model))}
    chosen: dict[int, _Chosen] = {}
    for name in sorted(found, key=order.__getitem__):
        by = tuple(entry for entry in patterns if any(matches(name, pattern) for pattern in patterns[entry]))
        stands_for = list(expand_container(name, found[name]))
        if not stands_for:
            problems.append(f"{name}: this {type(found[name]).__name__} holds no layer of an adapter")
        for inner_name, module in stands_for:
            chosen.setdefault(id(module), _Chosen(inner_name, module, by, role_of(name, roles)))
        problems.extend(variant_problems(name, found[name]))
    for layer in chosen.values():
        problems.extend(twin_problems(layer.name, layer.module))
    return [layer for layer in chosen.values() if can_be_twin(layer.module)]


def _fitting_sizes(
    chosen: list[_Chosen], num_groups: Size, sub_token_size: Size, problems: list[str]
) -> dict[str, tuple[int, int]]:
    """Name -> G and S; one sentence goes to `problems` for all layers that cannot be split for one reason."""
    sizes: dict[str, tuple[int, int]] = {}
    unfit: dict[str, list[str]] = {}
    for layer in chosen:
        try:
            sizes[layer.name] = _sizes(layer, num_groups, sub_token_size)
        except ConfigError as error:
            unfit.setdefault(str(error), []).append(layer.name)
    for sentence, (first, *others) in unfit.items():
        problems.append(f"{first}{f' and {len(others)} more' if others else ''}: {sentence}")
    return sizes


def _sizes(layer: _Chosen, num_groups: Size, sub_token_size: Size) -> tuple[int, int]:
    """G and S of one layer. ConfigError where its entry is missing, ambiguous or does not split the width."""
    width = width_of(layer.module)
    key, size = ("num_groups", num_groups) if sub_token_size is None else ("sub_token_size", sub_token_size)
    if isinstance(size, Mapping):
        keys = [*layer.entries, *(layer.role or "").split("+")]
        values = {size[k] for k in keys if k in size}
        if len(values) != 1:
            what = "no entry" if not values else f"several entries ({', '.join(map(str, sorted(values)))})"
            raise ConfigError(f"{key}={dict(size)} has {what} for it ({' or '.join(layer.entries)})")
        size = values.pop()
    return split_width(width, **{key: size})


def _look_for_frozen(chosen: list[_Chosen]) -> None:
    frozen = [layer.name for layer in chosen if not layer.module.weight.requires_grad]  # type: ignore[union-attr]
    if frozen and len(frozen) == len(chosen):
        raise ConfigError(
            f"the weights of all chosen layers are frozen ({frozen[0]} and {len(frozen) - 1} more), so VeLoRA would change "
            "nothing; choose layers that train"
        )
    if frozen:
        warnings.warn(f"VeLoRA changes nothing in layers whose weight is frozen: {', '.join(frozen)}", stacklevel=3)


@contextmanager
def _observing(layers: dict[str, VeloraTwin], gathered: dict[str, SubTokenStatistics]) -> Iterator[None]:
    """Add the inputs of every layer to its statistics while entered."""

    def observe(statistics: SubTokenStatistics, module: VeloraTwin, args: tuple, kwargs: dict[str, Any]) -> None:
        statistics.add(module.tokens(args[0] if args else next(iter(kwargs.values()))))

    handles = [
        layers[name].register_forward_pre_hook(partial(observe, statistics), with_kwargs=True)
        for name, statistics in gathered.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def without_a_trace(model: nn.Module) -> Iterator[None]:
    """Restore random states and buffers (batch norm's, in training mode) at the end."""
    devices = {p.device for p in model.parameters() if p.device.type in ("cuda", "xpu")}
    kind = next(iter(devices)).type if devices else "cuda"
    indices = sorted(device.index for device in devices)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng(devices=indices, device_type=kind):
        try:
            yield
        finally:
            for buffer, saved in buffers:
                buffer.copy_(saved)


def _forward(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple | list):
        model(*batch)
    else:
        model(batch)


def _sum_over_ranks(vectors: list[Tensor]) -> None:
    """Replace each vector by its sum over the ranks, in one collective; nothing in a single process."""
    if not (vectors and torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    flat = torch.cat([vector.to(vectors[0].device) for vector in vectors])
    torch.distributed.all_reduce(flat)
    for vector, summed in zip(vectors, flat.split([len(v) for v in vectors]), strict=True):
        vector.copy_(summed)
