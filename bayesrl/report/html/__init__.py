"""The page, its style, and figures within it."""
