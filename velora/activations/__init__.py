"""One file per value of the config group `activations`; see `velora/group.py`."""
