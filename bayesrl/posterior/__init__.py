"""What a fit gives, its draws and actions, and how it is told to ArviZ."""
