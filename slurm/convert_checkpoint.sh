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
set -euo pipefail
# sbatch runs a copy of this script; Slurm's record of the job has the path of the original.
script=$(scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null | sed -n '/^ *Command=/{s///p;q}') || true
for folder in "$(dirname "$0")/.." "$(dirname "${script%%.sh *}")/.." "${SLURM_SUBMIT_DIR:-.}"; do
    [[ -n "${MEGATRON_LLMJP:-}" || ! -f "$folder/slurm/common.sh" ]] || MEGATRON_LLMJP=$folder
done
source "${MEGATRON_LLMJP:?is not set: export it with the path of the checkout}/slurm/common.sh"
workers=()
[[ -n "$(value_of --workers "$@")" ]] || workers=(--workers "${SLURM_CPUS_PER_TASK:-1}")
exec "$PYTHON" -m megatron_llmjp.convert.cli "$@" "${workers[@]}"
