"""Moving along one axis of a method or an experiment, without knowing which keys it sets.

`method=lora_velora activations=exact`: the method's file sets `activations.layers`, which the value that the user has chosen does
not have. Such a key goes, before any interpolation is resolved, for it may refer to what is gone with another axis. It goes if

- the user has chosen the value of the group himself (on the command line, or in what `velora.compose` is given),
- it is a key of another kind of the group, so not a misspelt one, and none of the kind chosen,
- neither the user nor the file of the chosen value sets it: those who wrote it there are told that it is wrong.

A key that both kinds have keeps the method's value: the `adapter.rank` of an experiment is that of any adapter with a rank.
Only where it is no value for the chosen kind, but one for another (FLoRA's pair of `eps` for AdamW), the file of the chosen value
decides.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from velora.config.parts import part_class, shipped_classes
from velora.config.run import AXES, GROUPS


def without_keys_of_other_values(composed: Any, overrides: Sequence[str], folders: Sequence[Path]) -> Any:
    """What Hydra has composed from `overrides`, without the keys that a move along an axis has left behind."""
    from omegaconf import OmegaConf, open_dict, read_write

    composed = copy.deepcopy(composed)
    chosen, given = _read(overrides)
    for axis, value in chosen.items():
        section = composed.get(axis)
        if not OmegaConf.is_dict(section):
            continue
        raw: Any = OmegaConf.to_container(section, resolve=False)
        kind = raw.get("kind")
        if not isinstance(kind, str) or "${" in kind:
            continue
        file = _content(axis, value, folders)
        with read_write(section), open_dict(section):
            for key in [str(key) for key in raw if f"{axis}.{key}" not in given]:
                own = part_class(axis, kind, GROUPS[axis]).model_fields.get(key)
                others = [cls.model_fields[key] for cls in shipped_classes(axis).values() if key in cls.model_fields]
                if own is None and others and key not in file:
                    del section[key]
                elif own and key in file and not _fits(raw[key], own) and any(_fits(raw[key], o) for o in others):
                    section[key] = file[key]
    return composed


def _read(overrides: Sequence[str]) -> tuple[dict[str, str], set[str]]:
    """The values that the user has chosen of the axes, and the keys (`axis.key`) that he has set."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    chosen, given = {}, set()
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        path = override.key_or_group.split(".")
        if len(path) > 1:
            given.add(".".join(path[:2]))
        elif path[0] in AXES and not override.is_delete():
            chosen[path[0]] = str(override.value())
    return chosen, given


def _fits(value: Any, field: FieldInfo) -> bool:
    """Whether a key takes this value; what is not resolved yet might be anything."""
    if isinstance(value, str) and "${" in value:
        return True
    form: Any = Annotated[field.annotation, field]
    try:
        TypeAdapter(form).validate_json(json.dumps(value), strict=True)
    except ValidationError:
        return False
    return True


def _content(axis: str, value: str, folders: Sequence[Path]) -> dict[str, Any]:
    """What the file of a value sets, or one that its defaults name by its name alone."""
    import yaml

    found: dict[str, Any] = {}
    for file in (folder / axis / f"{value}.yaml" for folder in folders):
        content = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
        if isinstance(content, dict):
            for name in content.pop("defaults", None) or []:
                found |= _content(axis, name, folders) if isinstance(name, str) and name != "_self_" else {}
            found |= content
    return found
