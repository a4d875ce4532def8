"""What can be read off a traced JAX program: the flow of data, intervals."""
