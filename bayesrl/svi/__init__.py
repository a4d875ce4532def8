"""The one training loop: set up, step, run, checkpoints."""
