"""What is in this folder is data, and a script for another environment."""

collect_ignore = ["make_golden.py"]
