#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --job-name=chain:teacher/wide
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mem=900G
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/shared/runs/chain/slurm/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --signal=USR2@300
#SBATCH --time=1440

# setup
ulimit -n 65536
export OMP_NUM_THREADS=12
export GOWIDE_COLLECTIVE_TIMEOUT_S=600
export GOWIDE_GPUS_PER_NODE=8
export NCCL_DEBUG=WARN
export PYTHONPATH=/shared/runs/chain/slurm/code/DIGEST${PYTHONPATH:+:$PYTHONPATH}
export PYTHONSAFEPATH=1
set +eu  # of the setup: they would end this script before the teardown

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /shared/runs/chain/slurm/%j_%t_log.out --kill-on-bad-exit=1 --cpus-per-task=12 --cpu-bind=cores PYTHON3 -u -m submitit.core._submit /shared/runs/chain/slurm


# teardown
status=$?
job=/shared/runs/chain/slurm/$SLURM_JOB_ID
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

#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=12
#SBATCH --dependency=afterok:ID_OF_teacher/wide
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --job-name=chain:imitate/thin
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mem=900G
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/shared/runs/chain/slurm/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --signal=USR2@300
#SBATCH --time=1440

# setup
ulimit -n 65536
export OMP_NUM_THREADS=12
export GOWIDE_COLLECTIVE_TIMEOUT_S=600
export GOWIDE_GPUS_PER_NODE=8
export NCCL_DEBUG=WARN
export PYTHONPATH=/shared/runs/chain/slurm/code/DIGEST${PYTHONPATH:+:$PYTHONPATH}
export PYTHONSAFEPATH=1
set +eu  # of the setup: they would end this script before the teardown

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /shared/runs/chain/slurm/%j_%t_log.out --kill-on-bad-exit=1 --cpus-per-task=12 --cpu-bind=cores PYTHON3 -u -m submitit.core._submit /shared/runs/chain/slurm


# teardown
status=$?
job=/shared/runs/chain/slurm/$SLURM_JOB_ID
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

#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=12
#SBATCH --dependency=afterok:ID_OF_imitate/thin:ID_OF_teacher/wide
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --job-name=chain:distill/thin
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mem=900G
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/shared/runs/chain/slurm/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --signal=USR2@300
#SBATCH --time=1440

# setup
ulimit -n 65536
export OMP_NUM_THREADS=12
export GOWIDE_COLLECTIVE_TIMEOUT_S=600
export GOWIDE_GPUS_PER_NODE=8
export NCCL_DEBUG=WARN
export PYTHONPATH=/shared/runs/chain/slurm/code/DIGEST${PYTHONPATH:+:$PYTHONPATH}
export PYTHONSAFEPATH=1
set +eu  # of the setup: they would end this script before the teardown

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /shared/runs/chain/slurm/%j_%t_log.out --kill-on-bad-exit=1 --cpus-per-task=12 --cpu-bind=cores PYTHON3 -u -m submitit.core._submit /shared/runs/chain/slurm


# teardown
status=$?
job=/shared/runs/chain/slurm/$SLURM_JOB_ID
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

#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=12
#SBATCH --dependency=afterok:ID_OF_distill/thin
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --job-name=chain:finetune/thin
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mem=900G
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/shared/runs/chain/slurm/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --signal=USR2@300
#SBATCH --time=1440

# setup
ulimit -n 65536
export OMP_NUM_THREADS=12
export GOWIDE_COLLECTIVE_TIMEOUT_S=600
export GOWIDE_GPUS_PER_NODE=8
export NCCL_DEBUG=WARN
export PYTHONPATH=/shared/runs/chain/slurm/code/DIGEST${PYTHONPATH:+:$PYTHONPATH}
export PYTHONSAFEPATH=1
set +eu  # of the setup: they would end this script before the teardown

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /shared/runs/chain/slurm/%j_%t_log.out --kill-on-bad-exit=1 --cpus-per-task=12 --cpu-bind=cores PYTHON3 -u -m submitit.core._submit /shared/runs/chain/slurm


# teardown
status=$?
job=/shared/runs/chain/slurm/$SLURM_JOB_ID
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

#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --job-name=chain:baseline/thin
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mem=900G
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/shared/runs/chain/slurm/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --signal=USR2@300
#SBATCH --time=1440

# setup
ulimit -n 65536
export OMP_NUM_THREADS=12
export GOWIDE_COLLECTIVE_TIMEOUT_S=600
export GOWIDE_GPUS_PER_NODE=8
export NCCL_DEBUG=WARN
export PYTHONPATH=/shared/runs/chain/slurm/code/DIGEST${PYTHONPATH:+:$PYTHONPATH}
export PYTHONSAFEPATH=1
set +eu  # of the setup: they would end this script before the teardown

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /shared/runs/chain/slurm/%j_%t_log.out --kill-on-bad-exit=1 --cpus-per-task=12 --cpu-bind=cores PYTHON3 -u -m submitit.core._submit /shared/runs/chain/slurm


# teardown
status=$?
job=/shared/runs/chain/slurm/$SLURM_JOB_ID
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

