"""Environments as programs: tabular problems, classic control, JAX environments, logged data."""
