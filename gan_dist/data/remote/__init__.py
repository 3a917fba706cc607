"""Datasets at an address: fetched, and kept in a cache on this machine."""
