"""Learned twists: values of what is still to come, by which particles look ahead and policies propose."""
