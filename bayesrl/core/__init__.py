"""The language: rewards, nature and tilts inside NumPyro programs, and how they are scored."""
