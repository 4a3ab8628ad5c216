"""One file per value of the config group `optimizer`; see `velora/group.py`."""
