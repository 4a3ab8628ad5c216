"""SSF: scale and shift after every layer; the mathematics is in `velora/nn/ssf.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from velora.adapter._inserted import InsertedAdapter, seeded, target_patterns
from velora.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from velora.config import Config


class SSFAdapter(InsertedAdapter):
    """Scaling and shifting the features of a frozen network (arXiv 2210.08823).

    `targets`: roles or patterns; null for all places of the published code, which in any family are every linear
    layer, every norm and the patch embedding, but not the head.
    """

    kind: Literal["ssf"]
    targets: list[str] | None

    def apply(self, model: nn.Module, config: Config) -> nn.Module:
        from velora.head import head_names, train_in_float32
        from velora.nn.ssf import SSF, can_have_ssf
        from velora.swap import replace_modules

        model.requires_grad_(False)
        trained_whole = self.also_trained(model)
        excluded = tuple({*head_names(model), *trained_whole})

        def at_target(name: str, module: nn.Module) -> nn.Module:
            if can_have_ssf(module):
                return SSF(module)
            raise ConfigError(f"a {type(module).__name__} takes no scale and shift; a linear layer or a norm does")

        def everywhere(name: str, module: nn.Module) -> nn.Module:
            outside = any(name == e or name.startswith(e + ".") for e in excluded)
            return module if outside or not can_have_ssf(module) else SSF(module)

        with seeded(config.seed):
            if self.targets is None:
                replace_modules(model, ["*"], everywhere)
            else:
                replace_modules(model, target_patterns(self.targets, model, config), at_target)
        for name in trained_whole:
            train_in_float32(model.get_submodule(name))
        return model
