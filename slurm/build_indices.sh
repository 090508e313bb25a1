#!/usr/bin/env bash
#SBATCH --job-name=build_indices
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=4:00:00
#SBATCH --output=%x_%j.log
#SBATCH --requeue
# Build all sample indices of a run on a node without GPUs, so that no GPU waits for one.
#
#   sbatch slurm/build_indices.sh --config llm-jp-3-13b --fold-file folds.yaml --save checkpoints
set -euo pipefail
# sbatch runs a copy of this script; Slurm's record of the job has the path of the original.
script=$(scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null | sed -n '/^ *Command=/{s///p;q}') || true
for folder in "$(dirname "$0")/.." "$(dirname "${script%%.sh *}")/.." "${SLURM_SUBMIT_DIR:-.}"; do
    [[ -n "${MEGATRON_LLMJP:-}" || ! -f "$folder/slurm/common.sh" ]] || MEGATRON_LLMJP=$folder
done
source "${MEGATRON_LLMJP:?is not set: export it with the path of the checkout}/slurm/common.sh"
workers=()
[[ -n "$(value_of --workers "$@")" ]] || workers=(--workers "${SLURM_CPUS_PER_TASK:-1}")
exec "$PYTHON" -m data_tools.build_indices "$@" "${workers[@]}"
