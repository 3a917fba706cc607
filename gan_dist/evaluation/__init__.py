"""How good a generator's images are, by a fixed protocol."""
