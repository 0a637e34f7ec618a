"""Cluster profiles for SLURM jobs."""
