"""Particles of sequential Monte Carlo: resampling, moves, steps of time and of temperature, twists, and engines."""
