"""The dialects: wire formats live here and nowhere else."""
