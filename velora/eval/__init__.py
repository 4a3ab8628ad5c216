"""Benchmarks that score a whole network outside the training loop."""
