"""One file per value of the config group `weights`; see `velora/group.py`."""
