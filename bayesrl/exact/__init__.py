"""Exact posteriors: enumeration, dynamic programming along time, backward induction against nature."""
