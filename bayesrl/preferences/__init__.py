"""Preferences: judgements of people as data, and posteriors over the rewards behind them."""

from bayesrl.preferences.calibrated_inference import score_inference
from bayesrl.preferences.comparison_models import bradley_terry, gaussian_ratings, plackett_luce, thurstone
from bayesrl.preferences.direct.direct_preference import DirectPreference
from bayesrl.preferences.inference import infer
from bayesrl.preferences.records.preference_data import PreferenceData
from bayesrl.preferences.records.record_reading import read
from bayesrl.preferences.reward_posterior import RewardPosterior
from bayesrl.preferences.text_scores import TextScores

__all__ = [
    "DirectPreference",
    "PreferenceData",
    "RewardPosterior",
    "TextScores",
    "bradley_terry",
    "gaussian_ratings",
    "infer",
    "plackett_luce",
    "read",
    "score_inference",
    "thurstone",
]
