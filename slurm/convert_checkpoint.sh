#!/usr/bin/env bash
#SBATCH --job-name=convert_checkpoint
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=12:00:00
#SBATCH --output=%x_%j.log
#SBATCH --requeue
# Convert a checkpoint on a node without GPUs; the input may be the folder of a running job.
#
#   sbatch slurm/convert_checkpoint.sh --from native --to hf --input checkpoints --output model-hf
#
# As an array, every task writes some of the output files; the last task creates the output folder:
#
#   sbatch --array=0-15 slurm/convert_checkpoint.sh --to hf --input checkpoints/iter_0100000 \
#       --output model-hf
#
# A killed task continues when it is requeued or resubmitted. To resubmit some tasks of an array, give
# the number of tasks of the whole array: sbatch --array=3,7 ... --shard slurm/16
set -euo pipefail
# sbatch runs a copy of this script; Slurm's record of the job has the path of the original.
script=$(scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null | sed -n '/^ *Command=/{s///p;q}') || true
for folder in "$(dirname "$0")/.." "$(dirname "${script%%.sh *}")/.." "${SLURM_SUBMIT_DIR:-.}"; do
    [[ -n "${MEGATRON_LLMJP:-}" || ! -f "$folder/slurm/common.sh" ]] || MEGATRON_LLMJP=$folder
done
source "${MEGATRON_LLMJP:?is not set: export it with the path of the checkout}/slurm/common.sh"
workers=()
[[ -n "$(value_of --workers "$@")" ]] || workers=(--workers "${SLURM_CPUS_PER_TASK:-1}")
SHARD=()
[[ -z "${SLURM_ARRAY_TASK_ID:-}" ]] || set_shard "$@"
exec "$PYTHON" -m megatron_llmjp.convert.cli "$@" "${workers[@]}" "${SHARD[@]}"
