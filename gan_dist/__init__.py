"""Distributed DCGAN training: shards, streams and one synchronised game on any number of ranks."""
