"""Models of the unknown."""
