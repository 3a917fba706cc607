"""A run on disk: its name, directory, checkpoints, lease and records."""
