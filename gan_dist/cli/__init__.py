"""The `gan-dist` command: the only place that parses arguments, handles signals and exits."""
