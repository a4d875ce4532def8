"""The agents of `learn`."""
