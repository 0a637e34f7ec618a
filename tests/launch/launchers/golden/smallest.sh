#!/bin/bash
#SBATCH --job-name=first
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --output=/runs/first/logs/slurm-%j.log

exec /env/bin/python -m anemoi_dist.launch.job /runs/first
