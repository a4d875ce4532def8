"""Checkpoints read and written: weights, configurations, caches."""
