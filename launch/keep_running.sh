#!/usr/bin/env bash
# Runs a command again while its exit code says that nothing is wrong with the run itself.
#
#   launch/keep_running.sh python -m lightning_jax.train --config=configs/minimax_m1.py:8b --workdir=/mnt/runs/m1_8b
#
# Ends with 0 (complete), 1 (training diverged), 2 (something to change), 130 and 143 (stopped, saved).
set -uo pipefail
for ((restart = 0; restart <= ${MAX_RESTARTS:-20}; restart++)); do
    "$@"
    code=$?
    case $code in
        0 | 1 | 2 | 130 | 143) exit "$code" ;;
    esac
    echo "keep_running: exit code $code" >&2
    sleep "${RESTART_SECONDS:-10}"
done
exit "$code"
