"""What runs inside one process of a sweep: `velora-train` with the overrides of one run, and an exit status more.

A run that was told to stop ends with `STOPPED` here, so that the sweep does not take it for a failed one. It also stops, as after
a SIGTERM (the step is finished, a checkpoint and the record are written), when the process of the sweep is gone: what was
killed with `kill -9` can tell nobody.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

STOPPED = 75
"""Exit status of a run that was stopped and can be continued (EX_TEMPFAIL of sysexits.h)."""

PARENT = "VELORA_SWEEP_PROCESS"
"""The environment variable with the number of the sweep's process; absent where that is on another machine."""


def main() -> None:
    from velora.cli import launch, run_and_score

    stop_without_parent(os.environ.pop(PARENT, ""))
    sys.argv[0] = "velora-train"  # what the record says is what a user would type for this one run
    sys.exit(launch("velora-train", run_and_score, stopped=STOPPED))


def stop_without_parent(parent: str, every_seconds: float = 0.5) -> None:
    """Watch for the end of the parent process, and then send SIGTERM to ourselves, once."""
    if not parent.isdecimal():
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(every_seconds)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="velora-sweep", daemon=True).start()


if __name__ == "__main__":
    main()
