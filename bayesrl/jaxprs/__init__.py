"""What a traced JAX program reveals: dependencies, intervals, polynomial degrees."""
