"""This machine's figures beside its physical limits: a step, the loader, preparation."""
