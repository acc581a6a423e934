#!/usr/bin/env bash
# Tells a command which of the workers of a Slurm job it is, and runs it:
#
#   srun examples/slurm_worker.sh keras-rsft fit photos/ --strategy multiworker
#
# TF_CONFIG, which `fit` reads, and Keras Tuner's variables, which `search` reads, are made
# of Slurm's own, so each machine must run one task, with all the GPUs that it has; task 0
# is the chief. KERAS_RSFT_PORT is where they talk to each other; by default it depends on
# the number of the job, so that two jobs may share a machine.
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
[ "$index" -eq 0 ] && name=chief || name=worker-$index
export KERASTUNER_TUNER_ID=$name
export KERASTUNER_ORACLE_IP=${hosts[0]} KERASTUNER_ORACLE_PORT=$port
exec env TF_CONFIG="{\"cluster\": {\"worker\": [${workers%, }]}, \"task\": {$task}}" "$@"
