"""Every engine of one posterior, with the same number of evaluations: what each says of log Z, and at what cost."""
