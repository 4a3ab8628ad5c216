"""Parameter groups for GaLore, FLoRA and Grass: the matrices that get a rank, and all the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from velora.config.roles import ROLES, roles_of
from velora.errors import ConfigError
from velora.nn.swap import find_modules, raise_problems
from velora.optim.groups import weight_decay_groups


def low_rank_groups(
    model: nn.Module,
    layers: Sequence[str] | None,
    rank: float,
    weight_decay: float,
    *,
    of_rows: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    """Groups of the trainable parameters: the weights of `layers`, with their rank and `options`, before the others.

    `layers` are roles or patterns of module names; None stands for every layer that plays a role. A `rank` below 1 is a
    fraction of each matrix's shorter side, rounded down. It must be smaller than that side, or with `of_rows` than the number
    of rows. ConfigError names every layer that cannot have the rank.
    """
    resolved = roles_of(model)
    entries = list(resolved) if layers is None else list(layers)
    unknown = [entry for entry in entries if entry in ROLES and entry not in resolved]
    if not entries or unknown:
        known = (
            f"its roles are {', '.join(resolved)}" if resolved else "its architecture is not in velora/config/roles.py"
        )
        raise ConfigError(
            f"optimizer.layers={layers}: {type(model).__name__} has no {', '.join(unknown) or 'roles'}; {known}; "
            "name roles or patterns of module names, or set model.roles"
        )
    found = find_modules(model, [pattern for entry in entries for pattern in resolved.get(entry, [entry])])
    raise_problems(list(_problems(found, rank, of_rows)))
    by_rank: dict[int, list[nn.Parameter]] = {}
    for module in found.values():
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        same_rank = by_rank.setdefault(_rank_of(weight, rank), [])
        if not any(weight is other for other in same_rank):  # tied weights stand once
            same_rank.append(weight)
    chosen = {id(p) for params in by_rank.values() for p in params}
    rest = weight_decay_groups(model, weight_decay)
    for group in rest:
        group["params"] = [p for p in group["params"] if id(p) not in chosen]
    low_rank = [{"params": params, "weight_decay": weight_decay, "rank": r, **options} for r, params in by_rank.items()]
    return [*low_rank, *(group for group in rest if group["params"])]


def _rank_of(weight: nn.Parameter, rank: float) -> int:
    return int(rank * min(weight.shape)) if rank < 1 else int(rank)


def _problems(found: dict[str, nn.Module], rank: float, of_rows: bool) -> Iterator[str]:
    """A sentence for all layers without a matrix, and one for each whose matrix cannot have the rank."""
    matrices = {name: module.weight for name, module in found.items() if _has_matrix(module)}
    without = [name for name in found if name not in matrices]
    if without:
        first, more = without[0], f"; nor have {len(without) - 1} more of them" if without[1:] else ""
        kind = type(found[first]).__name__
        yield f"optimizer.layers: {first} ({kind}) has no weight matrix of its own that trains, as a linear layer has{more}"
    for name, weight in matrices.items():
        assert isinstance(weight, nn.Parameter)
        resulting = _rank_of(weight, rank)
        full = weight.shape[0] if of_rows else min(weight.shape)
        if not 1 <= resulting < full:
            yield (
                f"optimizer.rank={rank} is rank {resulting} for {name} of shape {tuple(weight.shape)}; "
                f"it must be between 1 and {full - 1}: a full rank saves nothing"
            )


def _has_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 2 and weight.requires_grad
