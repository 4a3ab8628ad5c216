"""Moving along one axis of a method or an experiment, without knowing which keys it sets.

`method=lora_velora activations=exact`: the method's file sets `activations.layers`, which the value that the user has chosen does not
have. Such a key goes, before any interpolation is resolved, for it may refer to a key that is gone with another axis. It goes if

- the user has chosen the value of the group himself (on the command line, or in what `velora.compose` is given),
- it is a key of another kind of the group, so not a misspelt one, and none of the kind chosen,
- neither the user nor the file of the chosen value sets it: those who wrote it there are told that it is wrong.

A key that both kinds have keeps the method's value: `optimizer.betas` of an experiment holds for any optimizer that has moments.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

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
        raw = OmegaConf.to_container(section, resolve=False)
        assert isinstance(raw, dict)
        kept = given | {f"{axis}.{key}" for key in _keys_of_file(axis, value, folders)}
        with read_write(section), open_dict(section):
            for key in _keys_of_other_kinds(axis, raw):
                if f"{axis}.{key}" not in kept:
                    del section[key]
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


def _keys_of_other_kinds(axis: str, section: dict[Any, Any]) -> Iterator[str]:
    kind = section.get("kind")
    if not isinstance(kind, str) or "${" in kind:
        return
    own = part_class(axis, kind, GROUPS[axis]).model_fields
    others = {key for cls in shipped_classes(axis).values() for key in cls.model_fields}
    yield from (key for key in section if key in others and key not in own)


def _keys_of_file(axis: str, value: str, folders: Sequence[Path]) -> set[str]:
    """What the file of a value sets itself, or one that its defaults name by its name alone."""
    import yaml

    keys: set[str] = set()
    for file in (folder / axis / f"{value}.yaml" for folder in folders):
        content = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
        if isinstance(content, dict):
            inherited = [name for name in content.pop("defaults", []) if isinstance(name, str) and name != "_self_"]
            keys |= {str(key) for key in content}
            keys |= {key for name in inherited for key in _keys_of_file(axis, name, folders)}
    return keys
