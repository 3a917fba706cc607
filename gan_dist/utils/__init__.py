"""Small tools that know nothing about data, networks or runs."""
