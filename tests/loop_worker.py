"""One process of two, as torchrun starts it: the runs of <folder>/runs.json, one after the other, into <folder>/two/."""

import json
import sys
from pathlib import Path

import torch

folder = Path(sys.argv[1])

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    from loop_helpers import config_of, train

    torch.set_num_threads(1)
    for name, overrides in json.loads((folder / "runs.json").read_text()).items():
        train(config_of(folder / "two" / name, *overrides))
