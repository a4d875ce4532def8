"""Models of what is unknown."""
