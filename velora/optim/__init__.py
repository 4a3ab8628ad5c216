"""Optimisers with a small state, as torch.optim has its own: GaLore, Q-GaLore, Grass, FLoRA, LOMO, an exact Adafactor."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from velora.optim.adafactor import Adafactor
    from velora.optim.flora import Flora
    from velora.optim.galore import GaLoreAdamW
    from velora.optim.grass import GrassAdamW
    from velora.optim.grass_factors import FactoredGrassAdamW
    from velora.optim.lomo import Lomo
    from velora.optim.q_galore import QGaLoreAdamW

_HOME = {
    "Adafactor": "adafactor",
    "FactoredGrassAdamW": "grass_factors",
    "Flora": "flora",
    "GaLoreAdamW": "galore",
    "GrassAdamW": "grass",
    "Lomo": "lomo",
    "QGaLoreAdamW": "q_galore",
}

__all__ = ["Adafactor", "FactoredGrassAdamW", "Flora", "GaLoreAdamW", "GrassAdamW", "Lomo", "QGaLoreAdamW"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"velora.optim.{_HOME[name]}"), name)
    raise AttributeError(f"module 'velora.optim' has no attribute {name!r}")
