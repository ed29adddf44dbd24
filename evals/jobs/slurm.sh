#!/usr/bin/env bash
#SBATCH --job-name=steerlens
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@180
#SBATCH --output=steerlens-%A_%a.log
#
# An evaluation job as a SLURM job array, and the merge of its shards once all of them are done. On a login node, with
# steerlens[eval] installed where the nodes see it:
#
#   bash slurm.sh JOB.yaml OUTPUT [SHARDS] [options of sbatch, such as --account=A --gpus-per-node=8]
#
# An array task is one shard on one node, with a process per GPU. GPUS_PER_REPLICA=2 starts a process for every two
# GPUs, for a model whose job says `gpus_per_replica: 2`.
# A task that is stopped or runs out of time keeps its finished batches, is queued again and goes on from there.
set -euo pipefail

usage="bash slurm.sh JOB.yaml OUTPUT [SHARDS] [options of sbatch]"

submit() {
    local script job output shards=4 array
    script=$(realpath "$0")
    job=$(realpath "${1:?$usage}")
    output=$(realpath --canonicalize-missing "${2:?$usage}")
    shift 2
    if [[ ${1:-} =~ ^[1-9][0-9]*$ ]]; then
        shards=$1
        shift
    fi
    # Nodes often have no network: models, data sets and metrics are fetched here.
    steerlens eval --config "$job" --prefetch
    array=$(sbatch --parsable "$@" --array="0-$((shards - 1))" "$script" --shard "$job" "$output" "$shards")
    array=${array%%;*}
    sbatch "$@" --dependency="afterok:$array" --kill-on-invalid-dep=yes --gpus-per-node=0 --cpus-per-task=1 \
        --time=00:30:00 --output=steerlens-%j.log "$script" --merge "$job" "$output"
}

shard() {
    local job=$1 output=$2 shards=$3 processes worker status=0 stopped=0 launch
    processes=$((SLURM_GPUS_ON_NODE / ${GPUS_PER_REPLICA:-1}))
    export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / processes))
    # Port 0 is any free one: two tasks may share a node.
    launch=(--num_processes "$processes" --num_machines 1 --main_process_port 0 --mixed_precision no --dynamo_backend no)
    if ((processes > 1)); then
        launch+=(--multi_gpu)
    fi
    srun accelerate launch "${launch[@]}" -m steerlens.cli eval \
        --config "$job" --output "$output" --shard "$SLURM_ARRAY_TASK_ID/$shards" --resume &
    worker=$!
    # SIGTERM comes to this shell alone (--signal=B:), and srun hands it to every process of the task.
    trap 'stopped=1; kill -TERM "$worker" 2>/dev/null || true' TERM
    wait "$worker" || status=$?
    if ((stopped)); then
        wait "$worker" || status=$?
    fi
    # 143: ended by SIGTERM, as preemption sends it.
    if ((stopped || status == 143)); then
        scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
    fi
    # 3: done, and some samples have errors, which the report lists.
    exit "$((status == 3 ? 0 : status))"
}

merge() {
    export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
    steerlens eval --config "$1" --output "$2" --merge
}

case ${1:-} in
    --shard) shard "${@:2}" ;;
    --merge) merge "${@:2}" ;;
    *) submit "$@" ;;
esac
