"""Side-by-side measurements, each one command; RESULTS.md is written by them."""
