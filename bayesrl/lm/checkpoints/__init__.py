"""Read and write checkpoints: weights, configurations, caches."""
