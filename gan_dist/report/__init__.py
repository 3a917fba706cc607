"""A run read back into one self-contained page."""
