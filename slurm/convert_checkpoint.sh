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
MEGATRON_LLMJP=${MEGATRON_LLMJP:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}}
source "$MEGATRON_LLMJP/slurm/common.sh"
workers=()
[[ -n "$(value_of --workers "$@")" ]] || workers=(--workers "${SLURM_CPUS_PER_TASK:-1}")
exec "$PYTHON" -m megatron_llmjp.convert.cli "$@" "${workers[@]}"
