"""The status of a run, derived from its files and from SLURM."""
