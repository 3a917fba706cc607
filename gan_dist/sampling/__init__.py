"""Images from a generator, and generators as files."""
