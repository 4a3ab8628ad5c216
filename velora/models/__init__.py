"""Networks with their preprocessing, built or loaded."""
