"""Sources to shards: what `gan-dist prepare` and `gan-dist verify` do."""
