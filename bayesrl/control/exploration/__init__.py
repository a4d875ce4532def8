"""Exploration rules, and the conjugate beliefs that they draw from."""
