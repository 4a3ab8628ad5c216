"""What the user must not overlook, said once."""

from __future__ import annotations

import os


def note(text: str) -> None:
    """Tell the user something about data or weights that must not be overlooked; once, not once per process."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}")
