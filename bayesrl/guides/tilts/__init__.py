"""How draws are tilted: one file per kind of family."""
