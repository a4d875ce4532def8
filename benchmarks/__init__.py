"""Side-by-side measurements, one command each; they write RESULTS.md."""
