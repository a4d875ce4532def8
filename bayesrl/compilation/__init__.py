"""What programs compute, compiled once: canonical forms, compiled functions, callbacks to the host, random keys."""
