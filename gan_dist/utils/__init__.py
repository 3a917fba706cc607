"""Small tools that know nothing of data, networks or runs."""
