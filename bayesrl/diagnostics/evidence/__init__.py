"""What is known of log Z and the gap of a fit, by several methods; `bounds` chooses among them.

All methods take the same things: a key, which is consumed whole; `programs` on all data, as `full_data_fit` makes
them; `params`, those of one fit, unconstrained; `beta`, reward units per nat, None without rewards; `num_samples`, the
greatest number of draws in all; `max_count`, the largest number of assignments to visit; and `reward_bound`, the
greatest total reward of a context.
"""
