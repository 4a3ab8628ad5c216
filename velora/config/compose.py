"""From overrides to a checked configuration: Hydra composes, and whatever is wrong is one sentence.

`velora.compose` and the command line (`velora/cli.py`) share all of it: the arguments are read one by one before Hydra reads
them again, so that a sentence can name the one that is wrong and say how to quote it; what Hydra, OmegaConf and YAML say then
is put into our words; the composed dictionary gets its name and is validated. No torch here.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from velora.config.axes import without_keys_of_other_values
from velora.config.level import has_level, settings_of, with_level
from velora.config.processes import check_processes
from velora.config.read import one_of, shown, unknown_key, unknown_value
from velora.config.run import Config, is_identity, validate
from velora.config.sweep import SweepConfig, is_sweep_key, take_sweep
from velora.errors import ConfigError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override


def compose(*overrides: str, config_dir: str | os.PathLike[str] | None = None) -> Config:
    """The configuration of `velora-train <overrides>`, checked.

        config = velora.compose("method=velora", "task=glue/sst2", "trainer.max_steps=100")

    An override chooses a value of a group or sets a key, in the grammar of Hydra; `config_dir` is a folder with groups of your
    own (the command line's --config-dir). Raises ConfigError with the command line's sentence where something is wrong.
    """
    check_processes()
    folders = config_folders(config_dir)
    given = with_level([_written(override, folders, multirun=False) for override in overrides], folders)
    own = [f"hydra.searchpath=[{_as_text(f'file://{folder.resolve()}')}]" for folder in folders[1:]]
    with one_sentence(folders):
        return configured(_composed([*given, *own]), given, folders)


def settings_of_a_sweep(overrides: Sequence[str]) -> tuple[SweepConfig, Path]:
    """What `sweep.` says and `runs_dir`, from their overrides alone."""
    from omegaconf import OmegaConf

    with one_sentence([conf_dir()]):
        composed = _composed(overrides)
        section = OmegaConf.to_container(composed.sweep, resolve=True)
        return take_sweep({"sweep": section}), Path(str(composed.runs_dir))


def _composed(overrides: Sequence[str]) -> Any:
    """What Hydra makes of the overrides, outside of its own command line."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    with initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
        return hydra_compose("config", list(overrides))


def configured(composed: Any, overrides: Sequence[str], folders: Sequence[Path]) -> Config:
    """What Hydra has composed, resolved, named and validated; `overrides` are those that it was composed with, out of `folders`."""
    from omegaconf import OmegaConf

    composed = without_keys_of_other_values(composed, overrides, folders)
    container = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    assert isinstance(container, dict)
    raw = {str(k): v for k, v in container.items()}
    take_sweep(raw)
    experiment = raw.get("experiment")
    if (
        isinstance(experiment, dict)
        and experiment.get("table")
        and has_level("paper", str(experiment["name"]), folders)
    ):
        experiment.setdefault("level", "paper")
    raw["name"] = raw.get("name") or default_name(raw, _without_those_of_the_level(raw, overrides, folders))
    return validate(raw)


def _without_those_of_the_level(raw: dict[str, Any], overrides: Sequence[str], folders: Sequence[Path]) -> list[str]:
    experiment = raw.get("experiment")
    if not isinstance(experiment, dict) or not experiment.get("level"):
        return list(overrides)
    stands_for = settings_of(str(experiment.get("name")), str(experiment["level"]), folders)
    return [override for override in overrides if override not in stands_for]


def default_name(raw: dict[str, Any], overrides: Sequence[str]) -> str:
    """`<task>-<model>-<method>` and every further override that changes what is computed, in the order of the keys.

    Rows of the paper that are not run as published lie in a folder of their level.
    """

    def name_of(group: str) -> str | None:
        section = raw.get(group)
        return section.get("name") if isinstance(section, dict) else None

    names = [name_of(group) for group in ("task", "model", "method")]
    base = "-".join(re.sub(r"[^\w.]+", "_", str(n)).strip("_") for n in names)
    if experiment := name_of("experiment"):
        level = raw["experiment"].get("level") or "paper"
        base = f"{experiment}-{base}" if level == "paper" else f"{level}/{experiment}-{base}"
    extra = []
    for override in sorted(overrides):
        key, _, value = override.lstrip("+~").partition("=")
        stands_elsewhere = key in ("task", "model", "method", "experiment", "seed")  # the seed in the folder
        if is_identity(key) and not stands_elsewhere and not key.startswith("hydra") and not is_sweep_key(key):
            extra.append(re.sub(r"[^\w.=+,-]+", "_", f"{key}={value}"))
    name = "-".join([base, *extra])
    if len(name) > 200:
        name = f"{name[:180]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return name


# The folders of the groups


def conf_dir() -> Path:
    """The folder of the shipped configuration: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent.parent
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def config_folders(config_dir: str | os.PathLike[str] | None) -> list[Path]:
    """The shipped folder, and the user's own; ConfigError where that is none."""
    if config_dir is not None and not Path(config_dir).is_dir():
        raise ConfigError(f"--config-dir {config_dir} is not a folder; give the one that holds your groups")
    return [conf_dir(), *([] if config_dir is None else [Path(config_dir)])]


def _choices(group: str, folders: Sequence[Path]) -> list[str]:
    """All values of a group, nested ones as `glue/sst2`; empty for what is no group."""
    below = [folder / group for folder in folders if group]
    return sorted({str(f.relative_to(top).with_suffix("")) for top in below for f in top.rglob("*.yaml")})


# The arguments, before Hydra reads them


def checked(arguments: Sequence[str]) -> tuple[list[str], list[Path]]:
    """The arguments of a command line as Hydra is to read them, and the folders of the groups.

    Every `group=glob(pattern)` is written as a comma list, and a level as what it stands for. ConfigError for an argument that
    cannot be right.
    """
    others, overrides, folders = checked_apart(arguments)
    return [*others, *with_level(overrides, folders)], folders


def checked_apart(arguments: Sequence[str]) -> tuple[list[str], list[str], list[Path]]:
    """Options, overrides with every glob written out, and the folders of the groups."""
    options = arguments_of(arguments)
    folders = config_folders(options.config_dir)
    others = list(arguments)
    for argument in options.overrides:
        others.remove(argument)
    return others, [_written(argument, folders, options.multirun) for argument in options.overrides], folders


def arguments_of(arguments: Sequence[str]) -> Any:
    """The command line as Hydra's own parser reads it; ConfigError for what it refuses."""
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
    known = _choices(key, folders)
    if is_sweep_key(key) and (override.is_sweep_override() or not multirun):
        raise ConfigError(
            f"{argument}: the keys of a sweep are for all of its runs; "
            + ("give one value" if multirun else "a single run has none: add -m, or leave it out")
        )
    if override.type == OverrideType.DEL:
        return argument
    if override.is_sweep_override():
        glob = isinstance(value, Glob)
        values: list[Any] = ["..."]  # of an interval, for sweepers that search
        if override.is_discrete_sweep():
            values = _matching(argument, key, value, known) if glob else list(override.sweep_iterator())
        if not values:
            raise ConfigError(f"{argument} gives no value, so nothing would run")
        if not multirun and not (glob and len(values) == 1):
            raise ConfigError(
                f"{argument} gives several values: add -m for one run each, write [...] around a list, or quote a text: "
                f"{quoted(argument)}"
            )
        for choice in values if known and not glob and override.is_discrete_sweep() else ():
            _check_choice(f"{argument.partition('=')[0]}={choice}", key, choice, known)
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
    return shlex.quote(f"{key}=" + _as_text(value.strip("'\"")))


def _as_text(value: str) -> str:
    """A text in quotes, as Hydra reads it."""
    escaped = re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + found[2].replace('"', '\\"'), value)
    return f'"{escaped}"'


# What the libraries say


@contextmanager
def one_sentence(folders: Sequence[Path]) -> Iterator[None]:
    """Whatever Hydra, OmegaConf and YAML raise is a ConfigError of one sentence."""
    import yaml
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise ConfigError(_sentence(error, folders)) from None


def _sentence(error: Exception, folders: Sequence[Path]) -> str:
    """What Hydra, OmegaConf or YAML say, as one sentence that names the key or the file, the value and the remedy."""
    import yaml
    from omegaconf.errors import InterpolationResolutionError

    if isinstance(error, yaml.YAMLError):
        return _not_yaml(error)
    if isinstance(error, UnicodeDecodeError):
        return _not_text(error, folders)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(line for line in lines if not line.startswith(("full_key:", "object_type=", "reference_type=")))
    key = found[1] if (found := re.search(r"full_key: ([^\s]+)", str(error))) else ""
    if mandatory := re.search(r"Missing mandatory value: ([\w.]+)", text):
        return f"{mandatory[1]} has no value; give {mandatory[1]}=..."
    if isinstance(error, InterpolationResolutionError):
        return _not_resolved(key, text, error)
    if missing := re.search(r"Could not find '([^']*)'", text):
        return _no_choice(missing[1], str(error), folders)
    if listed := re.search(r"In '([^']*)': Could not (?:load|find) '([^']*)'", text):
        return f"{listed[1]}.yaml names {listed[2]} in its defaults, and there is no such file"
    if primary := re.search(r"Cannot find primary config '([^']*)'", text):
        return f"--config-name {primary[1]}: there is no such file in {conf_dir()}; leave it out"
    if unknown := re.search(r"Could not override '([\w./@-]+)'", text):
        key = unknown[1]
    if key:
        return _no_key(key)
    return text or type(error).__name__


def _no_key(key: str) -> str:
    keys = sorted(_shipped_keys())
    group = key.partition(".")[0]
    if key in keys:
        return f"{key} is a key of another value of {group}, not of the one in this run; choose that with {group}=..."
    return unknown_key(key, keys)


def _no_choice(path: str, message: str, folders: Sequence[Path]) -> str:
    group, _, value = path.rpartition("/") if path.startswith("hydra/") else path.partition("/")
    known = _choices(group, folders)
    if not known:  # a group of Hydra's own: it lists the values itself
        lines = message.partition("Available options")[2].partition("Config search path")[0].splitlines()[1:]
        known = [line.strip() for line in lines if line.strip()]
    return unknown_value(group, value, known)


def _not_resolved(key: str, text: str, error: Exception) -> str:
    where = f"{key} cannot be resolved: " if key else ""
    if column := re.search(r"'experiment\.settings\.([^']+)\.\w+' not found", text):
        experiment = error.parent_node._get_root().experiment  # type: ignore[attr-defined]
        return f"experiment={experiment.name} has no settings for {column[1]}; it has {', '.join(experiment.settings)}"
    if variable := re.search(r"Environment variable '([^']*)' not found", text):
        return f"{where}the environment variable {variable[1]} is not set; set it, or write ${{oc.env:{variable[1]},default}}"
    return f"{where}{text[:1].lower()}{text[1:]}; write a key of this configuration, like ${{model.name}}"


def _not_yaml(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    where = f"{mark.name} line {mark.line + 1}" if mark is not None else str(getattr(error, "name", "a file"))
    reason = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    return f"{where} cannot be read as YAML: {reason}"


def _not_text(error: UnicodeDecodeError, folders: Sequence[Path]) -> str:
    for file in (file for folder in folders for file in sorted(folder.rglob("*.yaml"))):
        try:
            file.read_text(encoding="utf-8")
        except UnicodeDecodeError as found:
            return f"{file} cannot be read: it is no UTF-8 text ({found.reason} at byte {found.start})"
    return f"a configuration file cannot be read: it is no UTF-8 text ({error.reason} at byte {error.start})"


def _shipped_keys() -> set[str]:
    """Every group and every key that some shipped file sets, for "did you mean"."""
    import yaml

    keys: set[str] = set()
    for file in conf_dir().rglob("*.yaml"):
        text = file.read_text()
        content = yaml.safe_load(text) or {}
        group = "" if file.parent == conf_dir() or text.startswith("# @package _global_") else file.parent.name
        for key, value in ({group: content} if group else content).items():
            keys.add(key)
            keys.update(f"{key}.{inner}" for inner in value) if isinstance(value, dict) else None
    return keys - {"defaults", "hydra"}
