"""Numbers with their errors: estimates, averages over draws, what every quantity means."""
