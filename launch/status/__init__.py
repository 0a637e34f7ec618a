"""What a run is doing, derived from its files and from SLURM."""
