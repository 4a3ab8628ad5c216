"""One file per value of the config group `model`; see `velora/group.py`."""
