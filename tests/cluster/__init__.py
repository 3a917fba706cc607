"""A real SLURM on this machine: `python -m tests.cluster` boots one to play with, the tests marked `cluster` use it."""
