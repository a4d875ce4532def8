"""The result of a fit: its posterior, draws and actions, and its form for ArviZ."""
