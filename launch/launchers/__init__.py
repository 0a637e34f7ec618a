"""Where ranks are started: this machine, SLURM, MPI."""
