"""Whether two folders of runs hold the same curves: `python tests/compare_runs.py BEFORE AFTER`, for a change that changes none.

Every metrics.jsonl of BEFORE is compared with the one of the same name in AFTER, byte for byte. Exit status 1 where one differs
or is missing.
"""

from __future__ import annotations

import sys
from pathlib import Path


def differing(before: Path, after: Path) -> list[str]:
    files = sorted(path.relative_to(before) for path in before.rglob("metrics.jsonl"))
    if not files:
        raise SystemExit(f"{before} holds no metrics.jsonl")
    return [
        str(file)
        for file in files
        if not (after / file).is_file() or (after / file).read_bytes() != (before / file).read_bytes()
    ]


if __name__ == "__main__":
    found = differing(Path(sys.argv[1]), Path(sys.argv[2]))
    print("\n".join(f"differs: {name}" for name in found) or "all curves are the same")
    sys.exit(bool(found))
