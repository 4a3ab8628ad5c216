"""The arguments of a command line, before Hydra composes them: every one must be readable, and a glob must match something.

Hydra reads the same arguments again; here they are read one by one, so that a sentence can name the one that is wrong, and
say how to quote it. No torch here.
"""

from __future__ import annotations

import argparse
import fnmatch
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from velora.config.read import one_of, shown, unknown_value
from velora.errors import ConfigError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override


def conf_dir() -> Path:
    """The folder of the shipped configuration: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent.parent
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def choices(group: str, folders: Iterable[Path]) -> list[str]:
    """All values of a group, nested ones as `glue/sst2`; empty for what is no group."""
    below = [folder / group for folder in folders if group]
    return sorted({str(f.relative_to(top).with_suffix("")) for top in below for f in top.rglob("*.yaml")})


def checked(arguments: Sequence[str]) -> list[str]:
    """The arguments with every `group=glob(pattern)` written as a comma list; ConfigError for one that cannot be right."""
    options = _options(arguments)
    folders = [conf_dir()]
    if options.config_dir is not None:
        folders.append(Path(options.config_dir))
        if not folders[-1].is_dir():
            raise ConfigError(f"--config-dir {options.config_dir} is not a folder; give the one that holds your groups")
    written = {argument: _written(argument, folders, options.multirun) for argument in options.overrides}
    return [written.get(argument, argument) for argument in arguments]


def _options(arguments: Sequence[str]) -> Any:
    from hydra._internal.utils import get_args_parser

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help lists what can be given")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    try:
        return parser.parse_args(list(arguments))
    except argparse.ArgumentError as error:
        refuse(str(error))


def _written(argument: str, folders: Sequence[Path], multirun: bool) -> str:
    """One override as Hydra is to read it."""
    from hydra.core.override_parser.types import Glob, OverrideType

    override = _parsed(argument)
    key, value = override.key_or_group, override.value()
    if not key:
        raise ConfigError(_unreadable(argument, ""))
    known = choices(key, folders)
    if override.type == OverrideType.DEL:
        return argument
    if override.is_sweep_override():
        glob = isinstance(value, Glob)
        values = _matching(argument, key, value, known) if glob else list(override.sweep_iterator())
        if not values:
            raise ConfigError(f"{argument} gives no value, so nothing would run")
        if not multirun and not (glob and len(values) == 1):
            raise ConfigError(
                f"{argument} gives several values: add -m for one run each, write [...] around a list, or quote a text: "
                f"{quoted(argument)}"
            )
        return f"{argument.partition('=')[0]}={','.join(map(str, values))}" if glob else argument
    if known:
        _check_choice(argument, key, value, known)
    return argument


def _check_choice(argument: str, group: str, value: Any, known: list[str]) -> None:
    top, _, rest = group.partition("/")
    if rest:
        raise ConfigError(
            f"{argument}: {group} is a folder of the group {top}; choose with {top}={rest}/{shown(value)}"
        )
    if isinstance(value, dict):
        raise ConfigError(
            f"{argument}: {group} is a group; choose one of its values ({group}=...) or set {group}.<key>=..."
        )
    if isinstance(value, list):
        raise ConfigError(f"{argument}: a run has one {group}; -m {group}={','.join(map(str, value))} runs each")
    if value is None:
        raise ConfigError(f"{argument} chooses nothing; leave it out, or choose one of {one_of(known)}")
    if not isinstance(value, str):
        raise ConfigError(unknown_value(group, shown(value), known))


def _matching(argument: str, group: str, pattern: Any, known: list[str]) -> list[str]:
    """The values of a group that a glob matches; each of its patterns sees the level of its own slashes."""
    if not known:
        groups = sorted(p.name for p in conf_dir().iterdir() if p.is_dir() and p.name != "recipe")
        raise ConfigError(
            f"{argument}: a glob goes over the values of a group, and {group} is none of {', '.join(groups)}"
        )

    def matches(value: str, patterns: list[str]) -> bool:
        return any(fnmatch.fnmatch(value, p) and value.count("/") == p.count("/") for p in patterns)

    found = [v for v in known if matches(v, pattern.include) and not matches(v, pattern.exclude)]
    if not found:
        raise ConfigError(f"{argument} matches nothing; {group} is one of {one_of(known)}")
    return found


def _parsed(argument: str) -> Override:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_overrides([argument])[0]
    except HydraException as error:
        raise ConfigError(_unreadable(argument, str(error))) from None


def _unreadable(argument: str, reason: str) -> str:
    key, equals, value = argument.partition("=")
    if not equals:
        return f"{argument} cannot be read; write group=choice or key=value, and ~key to leave a key out"
    if not re.fullmatch(r"(\+\+|\+|~)?[\w$][\w$./@:-]*", key) or key.endswith("."):
        return (
            f"{argument} cannot be read: {key or 'nothing'} before the = is not a key; write group=choice or key=value"
        )
    if function := re.search(r"while evaluating '.*?': (.*)", reason):
        return f"{argument} cannot be read: {function[1]}; if it is a text, quote it: {quoted(argument)}"
    for opened, closed in ("[]", "{}", "()"):
        if value.count(opened) != value.count(closed):
            return (
                f"{argument} cannot be read: {opened} and {closed} do not match; close it, or if it is a text, quote it: "
                f"{quoted(argument)}"
            )
    return f"{argument} cannot be read; a text with special characters (~ = , ( [ {{ :) is quoted: {quoted(argument)}"


def quoted(argument: str) -> str:
    """The argument with its value as a text: quotes for Hydra inside, quotes for the shell around all of it."""
    key, _, value = argument.partition("=")
    value = re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + found[2].replace('"', '\\"'), value.strip("'\""))
    return shlex.quote(f'{key}="{value}"')
