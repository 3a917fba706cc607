"""The synchronised game: update, recovery, loop."""
