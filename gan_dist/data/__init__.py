"""Sources to shards, shards to batches."""
