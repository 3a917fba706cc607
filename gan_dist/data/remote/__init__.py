"""Datasets at an address: fetching them, and their cache on this machine."""
