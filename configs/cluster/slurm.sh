#!/bin/bash
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@60
code=/shared/runs/code-$SLURM_JOB_ID  # of the first process, which alone knows whether there was a mistake
srun --gpu-bind=none bash -c 'trap : TERM; .venv/bin/python -m iumad_jax.main --cluster \
  --config=eyecandies:6-1 --config.dataset.root=/shared/eyecandies --workdir=/shared/runs/eyecandies; code=$?
  [ "$SLURM_PROCID" != 0 ] || echo $code > "$0"; exit $code' "$code"
case $(cat "$code") in 75 | 137) scontrol requeue "$SLURM_JOB_ID" ;; esac  # stopped, or a process was lost
