#!/bin/bash
#SBATCH --job-name=first
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --time=1-12:00:00
#SBATCH --partition=gpu
#SBATCH --account=weather
#SBATCH --cpus-per-task=16
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --mail-type=END
#SBATCH --dependency=afterok:12
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --output=/runs/first/logs/slurm-%j.log

type module >/dev/null 2>&1 || source /etc/profile
module load gcc/12 || exit 3
module load cuda/12.4 || exit 3
set -e
ulimit -c 0
source /env/activate
set +e

exec /env/bin/python -m anemoi_dist.launch.job /runs/first
