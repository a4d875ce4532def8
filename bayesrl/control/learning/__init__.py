"""Learn from experience: one loop for KL-regularised and for Bayesian RL."""
