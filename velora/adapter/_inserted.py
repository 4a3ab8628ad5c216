"""What the adapters that insert something have in common: targets, the head, saving what trains and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from velora.errors import ConfigError
from velora.group import Adapter

if TYPE_CHECKING:
    from torch import nn

    from velora.config import Config


class InsertedAdapter(Adapter):
    """The network is frozen, modules are inserted; they train, a classification head, and what `also_train` matches."""

    also_train: list[str]

    def save(self, model: nn.Module, folder: Path) -> None:
        from velora.adapter_state import save_adapter

        save_adapter(model, folder)

    def also_trained(self, model: nn.Module) -> list[str]:
        """Names of modules that train whole: a new head, and the matches of `also_train`."""
        from velora.head import new_head_names
        from velora.swap import find_modules

        return list(dict.fromkeys([*new_head_names(model), *find_modules(model, self.also_train)]))


def target_patterns(targets: list[str], model: nn.Module, config: Config) -> list[str]:
    """Glob patterns for the roles and patterns in `targets`; ConfigError for a role that the network does not have."""
    from velora.roles import ROLES, resolve_roles
    from velora.swap import module_names

    declared = next((found for module in model.modules() if (found := getattr(module, "velora_roles", None))), None)
    roles = resolve_roles(module_names(model), config.model.roles, declared)
    unknown = [target for target in targets if target in ROLES and target not in roles]
    if unknown:
        raise ConfigError(
            f"adapter.targets={targets}: model={config.model.name} has no {', '.join(unknown)} layers; its roles are "
            f"{', '.join(roles) or 'not known, set model.roles'}"
        )
    return list(dict.fromkeys(pattern for target in targets for pattern in roles.get(target, [target])))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from `seed` inside, untouched outside: an adapter starts the same whatever ran before it."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
