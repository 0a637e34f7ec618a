"""Launchers start ranks: on this machine, in SLURM, by MPI."""
