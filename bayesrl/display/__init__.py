"""How objects, numbers and progress show themselves."""
