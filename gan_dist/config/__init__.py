"""A configuration: every key documented, read from YAML and `key=value` words."""
