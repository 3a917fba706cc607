#!/bin/bash
#SBATCH --account=art
#SBATCH --partition=gpu
#SBATCH --constraint='a100|h100'
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=4
#SBATCH --mem=200G
#SBATCH --time=1-00:00:00
#SBATCH --exclude=node7,node9
#SBATCH --exclusive
#SBATCH --job-name='100% art'
#SBATCH --chdir='/scratch/runs/100% art'
#SBATCH --output='/scratch/runs/100%% art/logs/%j-batch.log'
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR2@300

export GAN_DIST_MAX_REQUEUES=7 GAN_DIST_MAX_STARTS=3
source '/scratch/runs/100% art/launch/20261123-120000-abcdef'/slurm/lib.sh
gan_dist_begin '/scratch/runs/100% art' '/scratch/runs/100% art/launch/20261123-120000-abcdef'

export NCCL_SOCKET_IFNAME=ib0
export GREETING='it'"'"'s fine'
gan_dist_setup
module load cuda/12.8
gan_dist_ready
export PYTHONPATH='/scratch/runs/100% art/launch/20261123-120000-abcdef/code.zip'${PYTHONPATH:+:$PYTHONPATH}

export SUBMITIT_EXECUTOR=slurm
gan_dist_preflight apptainer exec --nv image.sif /opt/env/bin/python
gan_dist_srun apptainer exec --nv image.sif /opt/env/bin/python -u -m launch.job.rank submitit '/scratch/runs/100% art/launch/20261123-120000-abcdef'
gan_dist_finish $?
