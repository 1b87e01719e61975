#!/usr/bin/env bash
# One TPU VM, a slice of many, or several slices: asks for them, waits, installs this commit on all hosts, and trains.
#
#   export NAME=m1 ZONE=us-east5-a TYPE=v5p-1024 VERSION=v2-alpha-tpuv5 NFS=10.0.0.2:/runs
#   launch/tpu.sh create [--spot]        # gcloud's options; returns when the slice is there
#   launch/tpu.sh install                # again after every change of the code
#   launch/tpu.sh train --config=configs/minimax_m1.py:456b --workdir=/mnt/runs/m1_456b
#   launch/tpu.sh log                    # follows host 0
#   launch/tpu.sh stop                   # all hosts save after the same step and end
#   launch/tpu.sh delete
#
# NFS is a Filestore share in the slice's network: all hosts must see the folder of the run. One VM (TYPE=v6e-8) needs
# none. TYPE counts cores on v5p (v5p-1024 is 512 chips), chips on v5e and v6e; their VERSIONs are v2-alpha-tpuv5,
# v2-alpha-tpuv5-lite and v2-alpha-tpuv6e. SLICES=2 makes two such slices, joined by the data center's network.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${NAME:?}" "${ZONE:?}"

slices=("$NAME")
nodes=(--node-id="$NAME")
if ((${SLICES:-1} > 1)); then # which are then called NAME-0, NAME-1, ...
    mapfile -t slices < <(seq --format="$NAME-%.0f" 0 $((SLICES - 1)))
    nodes=(--node-prefix="$NAME" --node-count="$SLICES")
fi

on_all() {
    for slice in "${slices[@]}"; do
        gcloud compute tpus tpu-vm ssh "$slice" --zone="$ZONE" --worker=all --command="$1"
    done
}

case "${1:-}" in
    create)
        gcloud compute tpus queued-resources create "$NAME" "${nodes[@]}" --zone="$ZONE" \
            --accelerator-type="${TYPE:?}" --runtime-version="${VERSION:?}" "${@:2}"
        until state=$(gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" --format="value(state.state)") &&
            [ "$state" = ACTIVE ]; do
            case $state in
                FAILED | SUSPENDED)
                    echo "$NAME is $state" >&2
                    exit 1
                    ;;
            esac
            echo "$NAME: $state"
            sleep "${POLL_SECONDS:-30}"
        done
        ;;
    install)
        archive=$(mktemp -d)/lightning_jax.tar.gz
        git archive --output="$archive" HEAD # what is not committed stays here
        for slice in "${slices[@]}"; do
            gcloud compute tpus tpu-vm scp "$archive" "$slice": --zone="$ZONE" --worker=all
        done
        # The machines' own Python is older than 3.11: uv brings one.
        on_all "set -e
            mkdir -p lightning_jax && tar -xzf lightning_jax.tar.gz -C lightning_jax
            curl -LsSf https://astral.sh/uv/install.sh | sh
            ~/.local/bin/uv venv --quiet --allow-existing --python=3.12 ~/venv
            ~/.local/bin/uv pip install --quiet --python=~/venv/bin/python --editable './lightning_jax[tpu]'
            if [ -n '${NFS:-}' ] && ! mountpoint -q /mnt/runs; then
                sudo apt-get install -qq -y nfs-common && sudo mkdir -p /mnt/runs
                sudo mount -o hard '${NFS:-}' /mnt/runs && sudo chmod a+rwx /mnt/runs
            fi"
        ;;
    train)
        # Every host runs this by itself: it goes on when the connection ends, and again when a host failed.
        on_all "cd lightning_jax && . launch/xla_flags.sh && nohup launch/keep_running.sh ~/venv/bin/python -u -m lightning_jax.train \
            $(printf '%q ' "${@:2}") >> ~/train.log 2>&1 < /dev/null & sleep 1"
        ;;
    log) gcloud compute tpus tpu-vm ssh "${slices[0]}" --zone="$ZONE" --worker=0 --command="tail -n 50 -F train.log" ;;
    stop) on_all "pkill -TERM --full [l]ightning_jax.train || true" ;;
    delete) gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force --quiet ;;
    *)
        sed -n '2,/^set/p' "$0" | sed '$d' >&2
        exit 2
        ;;
esac
