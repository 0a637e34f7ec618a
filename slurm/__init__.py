"""SLURM batch template and cluster profiles."""
