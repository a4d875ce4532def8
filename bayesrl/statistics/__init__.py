"""Numbers with their errors: estimates, averages over draws, and the definition of every quantity."""
