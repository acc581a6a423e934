#!/usr/bin/env bash
# Runs a command as one worker of a Slurm job:
#
#   srun examples/slurm_worker.sh keras-rsft fit photos/ --strategy multiworker
#
# It sets TF_CONFIG for `fit` and Keras Tuner's variables for `search` from Slurm's own.
# Each machine must run one task, with all its GPUs; task 0 is the chief. The workers
# connect at KERAS_RSFT_PORT; its default depends on the job's number, so that two jobs can
# share a machine.
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
