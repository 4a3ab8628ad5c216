"""Ctrl-C and SIGTERM as a request to stop: the step is finished, a checkpoint and the record are written."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


class StopRequest:
    """`signal_name` is set by the first signal; a second one interrupts at once."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        def note(number: int, frame: Any) -> None:
            if self.signal_name is not None:
                raise KeyboardInterrupt(f"stopped by a second {signal.Signals(number).name}")
            self.signal_name = signal.Signals(number).name

        with handling(note):
            yield


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Outside the training loop SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(f"stopped by {signal.Signals(number).name}")

    with handling(stop):
        yield


@contextlib.contextmanager
def handling(function: Any) -> Iterator[None]:
    """`function(number, frame)` answers SIGINT and SIGTERM."""
    try:
        before = {number: signal.signal(number, function) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread (a launcher's worker): the launcher's own handlers hold
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
