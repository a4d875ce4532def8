"""How far from the optimum: evidence, verdicts, frontiers, comparison, calibration."""
