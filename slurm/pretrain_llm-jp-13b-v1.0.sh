#!/usr/bin/env bash
#SBATCH --job-name=llm-jp-13b-v1.0
#SBATCH --nodes=12
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=1-00:00:00
#SBATCH --signal=USR1@900
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.log
# 12 nodes x 8 A100 40 GB = 96 GPUs: PP 8 x DP 12. Ten folds, 87,870 iterations, plus a refined
# fold.
#
#   sbatch slurm/pretrain_llm-jp-13b-v1.0.sh --save DIR --fold-file folds.yaml \
#       --tokenizer-type SentencePieceTokenizer --tokenizer-model tok.model
#
# Differences from the published run: megatron-core with the distributed optimizer instead of
# Megatron-DeepSpeed with ZeRO stage 1; data parallel communication overlaps computation;
# validation sets of the fold file instead of --split 949,50,1. LLM-jp's benchmark scripts name
# JapaneseSentencePiece, which ends documents by </s> (2); the published model ends them by <EOD>
# (7), as this type does. The script of the fold runs itself is not published.
set -euo pipefail
GPU=${GPU:-A100-40GB} # for --estimate
# sbatch runs a copy of this script; Slurm's record of the job has the path of the original.
script=$(scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null | sed -n '/^ *Command=/{s///p;q}') || true
for folder in "$(dirname "$0")/.." "$(dirname "${script%%.sh *}")/.." "${SLURM_SUBMIT_DIR:-.}"; do
    [[ -n "${MEGATRON_LLMJP:-}" || ! -f "$folder/slurm/common.sh" ]] || MEGATRON_LLMJP=$folder
done
source "${MEGATRON_LLMJP:?is not set: export it with the path of the checkout}/slurm/common.sh"
pretrain --config llm-jp-13b-v1.0 "$@"
