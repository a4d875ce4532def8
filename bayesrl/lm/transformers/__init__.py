"""Transformers: GPT-2, Llama and its relatives, and BERT and its relatives, as Equinox modules."""
