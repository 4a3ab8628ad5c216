"""The processes of a run, as torchrun announces them in the environment.

A run reads `WORLD_SIZE` and `RANK`, accelerate starts the communication where it finds `LOCAL_RANK`. Left over from another
program, one of them alone makes a run that trains on a part of its batch, or one that writes nothing; so it is all or none.
"""

from __future__ import annotations

import os

from velora.errors import ConfigError

_NUMBERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
_VARIABLES = (*_NUMBERS, "MASTER_ADDR", "MASTER_PORT")


def num_processes() -> int:
    """Processes of this run: torchrun says it; one without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_processes() -> None:
    """ConfigError for variables that do not describe a process of a distributed run, nor a run of one process."""
    given = {name: os.environ[name] for name in _NUMBERS if name in os.environ}
    for name, value in given.items():
        if not value.isdecimal() or (name == "WORLD_SIZE" and int(value) == 0):
            raise ConfigError(
                f"{name}={value} in the environment is not a number of processes, which torchrun sets; unset {name}"
            )
    if "LOCAL_RANK" not in given and given.get("WORLD_SIZE", "1") == "1" and given.get("RANK", "0") == "0":
        return
    text = " ".join(f"{name}={value}" for name, value in given.items())
    if missing := [name for name in _VARIABLES if not os.environ.get(name)]:
        raise ConfigError(
            f"{text} in the environment without {', '.join(missing)}: this is no process of a distributed run; start it "
            f"with torchrun, or unset {' '.join(given)}"
        )
    if max(int(given["RANK"]), int(given["LOCAL_RANK"])) >= int(given["WORLD_SIZE"]):
        raise ConfigError(f"{text} in the environment: a rank must be below WORLD_SIZE; start the run with torchrun")
