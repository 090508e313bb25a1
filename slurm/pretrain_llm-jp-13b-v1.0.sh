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
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.log
# 12 nodes x 8 A100 40 GB = 96 GPUs: PP 8 x DP 12. Ten folds, 87,870 iterations, plus a refined fold.
#
#   sbatch slurm/pretrain_llm-jp-13b-v1.0.sh --save DIR --fold-file folds.yaml \
#       --tokenizer-type SentencePieceTokenizer --tokenizer-model tok.model
set -euo pipefail
MEGATRON_LLMJP=${MEGATRON_LLMJP:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}}
GPU=${GPU:-A100-40GB} # for --estimate
source "$MEGATRON_LLMJP/slurm/common.sh"
pretrain --config llm-jp-13b-v1.0 "$@"
