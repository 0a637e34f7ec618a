#!/bin/bash
#SBATCH --job-name=first
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --constraint="a\&b\|[c\*2]"
#SBATCH --comment="it is \"\#1\"\; \$\(id\)"
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --output="/scratch/it\'s\; 50%% \$HOME/first/logs/slurm-%j.log"

exec /env/bin/python -m anemoi_dist.launch.job '/scratch/it'"'"'s; 50% $HOME/first' --srun -- echo '$(id)' 'a b' ''
