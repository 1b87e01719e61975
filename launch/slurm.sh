#!/usr/bin/env bash
# A SLURM job on GPU nodes: one process on each node drives all its GPUs.
#
#   sbatch --nodes=4 launch/slurm.sh --config=configs/minimax_m1.py:8b --workdir=/shared/runs/m1_8b
#
# The folder of the run must be seen by all nodes. Hosts find one another by SLURM's own variables. A job that fails, is
# preempted or comes to its time limit goes back into the queue and on from its last checkpoint.
#
#SBATCH --job-name=lightning_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -uo pipefail
# shellcheck disable=SC1091 # the file beside this one, where the job was submitted
. "${SLURM_SUBMIT_DIR:-.}/launch/xla_flags.sh"

# --signal: SIGTERM to the hosts five minutes before the limit; they save after the same step and end with 143.
# --wait: hosts that lose one end by themselves and say why, within a minute; then SLURM kills what is left.
# --label: each line begins with the number of its host.
srun --label --kill-on-bad-exit=0 --wait=60 "${PYTHON:-python}" -u -m lightning_jax.train "$@"
code=$?

case $code in
    0) echo "complete" ;;
    1 | 2) echo "stopped with code $code: see above what has to be changed" ;;
    *)
        if ((${SLURM_RESTART_COUNT:-0} < ${MAX_RESTARTS:-20})); then
            echo "exit code $code: back into the queue"
            scontrol requeue "$SLURM_JOB_ID"
        fi
        ;;
esac
exit "$code"
