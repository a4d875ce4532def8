"""How objects, numbers and progress are displayed."""
