"""Policies fitted to judgements directly, without a model of the reward between."""
