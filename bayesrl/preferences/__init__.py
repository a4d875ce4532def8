"""Preferences: judgements of people as data, and posteriors over the rewards behind them."""

from bayesrl.preferences.preference_data import PreferenceData, read

__all__ = ["PreferenceData", "read"]
