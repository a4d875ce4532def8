"""Tokenizers, the files that hold them, and chat templates."""
