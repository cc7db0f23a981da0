#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=96
#SBATCH --exclusive
#SBATCH --job-name=imagenet:encode
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mem=900G
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/shared/data/imagenet.slurm/%j_0_log.out
#SBATCH --partition=cpu
#SBATCH --requeue
#SBATCH --signal=USR2@300
#SBATCH --time=600

# setup
ulimit -n 65536
export OMP_NUM_THREADS=96
export GOWIDE_COLLECTIVE_TIMEOUT_S=600
export NCCL_DEBUG=WARN
export PYTHONPATH=/shared/data/imagenet.slurm/code/DIGEST${PYTHONPATH:+:$PYTHONPATH}
export PYTHONSAFEPATH=1
set +eu  # of the setup: they would end this script before the teardown

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /shared/data/imagenet.slurm/%j_%t_log.out --kill-on-bad-exit=1 --cpus-per-task=96 --cpu-bind=cores PYTHON3 -u -m submitit.core._submit /shared/data/imagenet.slurm


# teardown
status=$?
job=/shared/data/imagenet.slurm/$SLURM_JOB_ID
start="${job}_${SLURM_RESTART_COUNT:-0}"
limit="timeout --signal=KILL 60"
notify() {
  true
}
refused() {
  notify failed
  touch "${job}_refused"
  echo "gowide: Slurm refuses to queue this job again; gowide submit continues from what is saved" >&2
  exit 1
}
again() {
  trap '' TERM
  limit=
  scontrol requeue "$SLURM_JOB_ID" || refused
  notify requeued
  exit 0
}
if [ -e "${start}_saved" ]; then
  again  # before the end of the allocation
elif [ $status -ne 0 ] && [ ! -e "${start}_error.json" ] &&
     [ "$(cat "${job}_retries" 2> /dev/null | wc -l)" -lt 3 ]; then
  date >> "${job}_retries"  # a process crashed, hung or was killed, with nothing for the user to fix
  again
fi
[ $status -eq 0 ] && notify done || notify failed
exit $status

