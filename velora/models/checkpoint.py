"""Reading a checkpoint folder, or one of a hub, into a network: what may be missing, and what is refused.

One list, `velora.nn.head.new_parts`, says which modules are the task's own. Only there may a checkpoint lack parameters or have
them in another shape; they start from random weights then, and an adapter trains and saves them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from velora.errors import ConfigError
from velora.models.hub import load
from velora.run.notes import note

SHOWN_NAMES = 3


def read_network(what: str, read: Callable[[], Any], *, local: bool) -> Any:
    """The network that `read` makes together with transformers' loading info; `what` names the key ("model.path=DIR").

    Sets its attribute `velora_head` to what is new. Raises ConfigError for files that cannot be read, parameters that are
    missing or of another shape outside the head, blocks without a place in the network, and values that are not finite.
    """
    from velora.nn.head import is_within, new_parts

    model, info = load(what, "give model.path=DIR, a folder with a whole checkpoint", read, local=local)
    absent = {*info["missing_keys"], *(k[0] if isinstance(k, tuple) else k for k in info["mismatched_keys"])}
    parts = new_parts(model, absent)
    wrong = sorted(key for key in absent if not is_within(key, parts))
    if wrong:
        raise ConfigError(
            f"{what} is a checkpoint of another architecture, or its config.json is: {len(wrong)} parameters are missing "
            f"or of another shape, {wrong[0]} among them; choose the model= that belongs to it, or give a whole checkpoint"
        )
    unused = sorted(info["unexpected_keys"])
    own = {_of_first_block(name) for name, _ in model.named_parameters()}
    beyond = [key for key in unused if any(character.isdigit() for character in key) and _of_first_block(key) in own]
    if beyond:
        raise ConfigError(
            f"{what}: its config.json describes fewer blocks than its weights have, {beyond[0]} has no place; give a whole "
            "checkpoint"
        )
    if unused:
        shown = ", ".join(unused[:SHOWN_NAMES])
        note(f"{what}: {len(unused)} of its weights have no place in this network and were not read ({shown})")
    _refuse_not_finite(what, model)
    model.velora_head = parts
    return model


def _of_first_block(name: str) -> str:
    return re.sub(r"\.\d+\.", ".0.", name)


def _refuse_not_finite(what: str, model: Any) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ConfigError(
                f"{what}: the weights {name} are not finite (NaN, or beyond the range of {parameter.dtype}); give a "
                "whole checkpoint, or a wider weights.dtype"
            )
