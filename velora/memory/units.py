"""Bytes for people: 1 MiB = 2^20, 1 GiB = 2^30; GB and MB are powers of ten, as the paper's tables are read."""

from __future__ import annotations

import re

from velora.errors import ConfigError

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}ib": 2 ** (10 * power) for power, letter in enumerate("kmgt", 1)}
_UNITS |= {f"{letter}b": 10 ** (3 * power) for power, letter in enumerate("kmgt", 1)}


def parse_bytes(text: str) -> int:
    """ "24GiB", "8 GB", "512MiB" or plain bytes as a number of bytes; ConfigError for anything else, and for nothing."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _UNITS:
        raise ConfigError(f"{text!r} is not an amount of memory; write it like 24GiB, 8GB or 512MiB")
    num_bytes = int(float(match[1]) * _UNITS[match[2]])
    if num_bytes < 1:
        raise ConfigError(f"{text!r} is no memory at all; write what there is, like 24GiB, 8GB or 512MiB")
    return num_bytes


def mebibytes(num_bytes: int) -> str:
    """One number in MiB for a column of a table: "1,234.5"."""
    return f"{num_bytes / 2**20:,.1f}"


def format_bytes(num_bytes: int) -> str:
    """A number for a sentence: "1.23 GiB", "45.6 MiB" or "789 bytes"."""
    if abs(num_bytes) >= 2**30:
        return f"{num_bytes / 2**30:.2f} GiB"
    if abs(num_bytes) >= 2**20:
        return f"{num_bytes / 2**20:.1f} MiB"
    return f"{num_bytes} bytes" if abs(num_bytes) < 2**10 else f"{num_bytes / 2**10:.1f} KiB"
