"""What runs inside a job: ranks, their addresses, torchrun, whole commands."""
