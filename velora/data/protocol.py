"""How an epoch is chosen on VTAB-1k, and on tasks with the same four splits. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from velora.config.parts import Phase

if TYPE_CHECKING:
    from velora.config.run import Config

Protocol = Literal["select_then_retrain", "best_on_test", "last"]

PROTOCOLS: dict[Protocol, str] = {
    "select_then_retrain": "epoch selected on the 200 validation images, then trained on all 1000, then tested",
    "best_on_test": "best epoch on the TEST set, as the published repositories do; optimistic",
    "last": "trained on all 1000 images and tested at the end; nothing selected",
}


def splits_of(protocol: Protocol) -> tuple[str, ...]:
    """Names of the splits that a protocol reads."""
    retrain = ("train800val200", "test")
    return ("train800", "val200", *retrain) if protocol == "select_then_retrain" else retrain


def protocol_problems(protocol: Protocol, config: Config) -> Iterator[str]:
    """A sentence if an epoch is to be selected and only the last one is evaluated."""
    if protocol != "last" and config.trainer.eval_every == "end":
        yield (
            f"task.protocol={protocol} selects an epoch, and trainer.eval_every=end evaluates only the last one; "
            "give trainer.eval_every=epoch, or task.protocol=last"
        )


def phases(protocol: Protocol, splits: Mapping[str, Any]) -> list[Phase]:
    """What is trained on and evaluated on, in order."""
    if protocol == "select_then_retrain":
        return [
            Phase("select", splits["train800"], {"": splits["val200"]}),
            Phase(
                "retrain", splits["train800val200"], {"": splits["test"]}, stop_at_best_of="select", only_at_end=True
            ),
        ]
    return [Phase("train", splits["train800val200"], {"": splits["test"]}, only_at_end=protocol == "last")]
