"""velora-bench: speed and bytes of one layer, of a whole training step, and what only a GPU can show."""
