"""What Hydra, OmegaConf and YAML say, as one sentence that names the key or the file, the value and the remedy."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from velora.config.overrides import choices, conf_dir
from velora.config.read import unknown_key, unknown_value


def sentence(error: Exception, folders: Iterable[Path] = ()) -> str:
    """`folders`: of the user's own configuration files."""
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


def _no_choice(path: str, message: str, folders: Iterable[Path]) -> str:
    group, _, value = path.rpartition("/") if path.startswith("hydra/") else path.partition("/")
    known = choices(group, [conf_dir(), *folders])
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


def _not_text(error: UnicodeDecodeError, folders: Iterable[Path]) -> str:
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
