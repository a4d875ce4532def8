"""The methods of `evidence`, one file each."""
