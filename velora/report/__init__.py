"""Tables and figures from the records below `runs/`."""
