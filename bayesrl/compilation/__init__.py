"""Compile each computation once: canonical forms, compiled functions, callbacks to the host, random keys."""
