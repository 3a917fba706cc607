"""The cluster's side: runs from the checkout as `python -m launch ...`. Knows SLURM; gan_dist does not."""
