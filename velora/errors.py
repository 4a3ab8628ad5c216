"""The errors of the program and the exit status that each one ends it with."""

from __future__ import annotations

import re

# What torch makes of the text of an exception that a data loader's process (or the thread that pins memory) has raised:
# "Caught <type> in <where>.", then the whole traceback, whose last lines are "<module>.<type>: <text>".
_FROM_WORKER = re.compile(r"Caught (\w+) in [^\n]*\nOriginal Traceback .*\n(?:[\w.]+\.)?\1: (.*)", re.DOTALL)


def original_text(text: object) -> str:
    """An exception's text as it was raised, also where torch raises it again out of a data loader's process."""
    found = _FROM_WORKER.fullmatch(str(text))
    return found[2].rstrip("\n") if found else str(text)


def first_line(error: BaseException) -> str:
    """What an error of a library says first; its class where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class ConfigError(ValueError):
    """The configuration or the data is wrong. The text names the key, its value and the remedy; exit status 2."""

    def __init__(self, text: object = "") -> None:
        super().__init__(original_text(text))


class RunError(RuntimeError):
    """A run ended badly after it had started; its record has been written. Exit status 1."""


class Diverged(RunError):
    """The loss, the gradient norm or a score is not finite."""


class Interrupted(RunError):
    """The run was told to stop (Ctrl-C or SIGTERM); a checkpoint was saved where one was possible."""
