"""Posteriors from weighted draws and from accepted draws, and the reward bounds behind them."""
