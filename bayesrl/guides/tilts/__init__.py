"""Tilts of distributions: one file per kind of family."""
