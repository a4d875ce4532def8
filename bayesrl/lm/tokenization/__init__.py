"""Tokenizers, their files, and chat templates."""
