"""Policies whose expectations are as asked, at the least KL to the prior."""
