# shellcheck shell=bash
# Flags with which XLA lets collectives travel while it computes. Source it on every host before the command; a run
# refuses to begin where hosts have different ones. What is default without it, and what shows that it helps: README.md.
#
#   . launch/xla_flags.sh && python -m lightning_jax.train --config=...

# TPUs. The tokens of a layer of experts on their way, which are else waited for.
LIBTPU_INIT_ARGS="${LIBTPU_INIT_ARGS:-} --xla_tpu_enable_async_all_to_all=true"
export LIBTPU_INIT_ARGS

# GPUs. The scheduler that begins collectives early; two layers of a scan in one turn, so that there is work beside the
# gathering of a layer's weights; and that gathering a turn ahead.
XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_latency_hiding_scheduler=true \
--xla_gpu_enable_while_loop_double_buffering=true --xla_gpu_enable_pipelined_all_gather=true"
export XLA_FLAGS
