#!/usr/bin/env bash
# Tells a command which of the workers of a Slurm job it is, and runs it:
#
#   srun examples/slurm_worker.sh keras-rsft fit photos/ --strategy multiworker
#
# TF_CONFIG, which TensorFlow and keras-rsft read, is made of Slurm's own variables, so
# each machine must run one task, with all the GPUs that it has. KERAS_RSFT_PORT is where
# the workers talk to each other; by default it depends on the number of the job, so that
# two jobs may share a machine.
set -euo pipefail

nodes=${SLURM_STEP_NODELIST:-${SLURM_JOB_NODELIST:?run this with srun, inside a job}}
index=${SLURM_PROCID:?run this with srun, inside a job}
port=${KERAS_RSFT_PORT:-$((20000 + ${SLURM_JOB_ID:-0} % 10000))}

listed=$(scontrol show hostnames "$nodes") # An assignment, so that its failure ends us.
mapfile -t hosts <<< "$listed"
if [ "${#hosts[@]}" -ne "${SLURM_NTASKS:-${#hosts[@]}}" ]; then
    echo "$0: there are ${SLURM_NTASKS} tasks on ${#hosts[@]} machines; ask for" \
        "--ntasks-per-node=1" >&2
    exit 2
fi

printf -v workers '"%s", ' "${hosts[@]/%/:$port}"
task="\"type\": \"worker\", \"index\": $index"
exec env TF_CONFIG="{\"cluster\": {\"worker\": [${workers%, }]}, \"task\": {$task}}" "$@"
