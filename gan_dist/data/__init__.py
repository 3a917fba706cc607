"""Shards to batches: the format, its order, the stream; how shards are made (prepare/) and fetched (remote/)."""
