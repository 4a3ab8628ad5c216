"""One file per value of the config group `task`; see `velora/group.py`."""
