"""The tasks: their data, batches and scores."""
