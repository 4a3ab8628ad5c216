"""One file per value of the config group `adapter`; see `velora/group.py`."""
