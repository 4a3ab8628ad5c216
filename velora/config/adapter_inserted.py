"""What the adapters that insert modules share: where they go, what trains beside them, what they start from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from velora.config.parts import Adapter
from velora.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from velora.config.run import Config


class InsertedAdapter(Adapter):
    """The network is frozen, modules are inserted; they train, a classification head, and what `also_train` matches."""

    also_train: list[str]

    def save(self, model: nn.Module, folder: Path) -> None:
        from velora.nn.adapter_state import save_adapter

        save_adapter(model, folder)

    def also_trained(self, model: nn.Module) -> list[str]:
        """Names of modules that train whole: a new head, and the matches of `also_train`."""
        from velora.nn.head import new_head_names
        from velora.nn.swap import find_modules

        return list(dict.fromkeys([*new_head_names(model), *find_modules(model, self.also_train)]))

    def insert(
        self, model: nn.Module, targets: list[str], config: Config, make: Callable[[nn.Linear], nn.Module], what: str
    ) -> None:
        """Freeze `model` and put `make(layer)` in the place of each target, a linear layer that is to have `what`."""
        from torch import nn

        from velora.nn.head import train_in_float32
        from velora.nn.swap import replace_modules

        def around(name: str, module: nn.Module) -> nn.Module:
            if not isinstance(module, nn.Linear):
                raise ConfigError(f"a {type(module).__name__} takes no {what}; a linear layer does")
            return make(module)

        model.requires_grad_(False)
        with seeded(config.seed):
            replace_modules(model, target_patterns(targets, model, config), around)
        for name in self.also_trained(model):
            train_in_float32(model.get_submodule(name))


def target_patterns(targets: list[str], model: nn.Module, config: Config) -> list[str]:
    """Glob patterns for the roles and patterns in `targets`; ConfigError for a role that the network does not have."""
    from velora.config.roles import ROLES, roles_of

    roles = roles_of(model, config.model.roles)
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
