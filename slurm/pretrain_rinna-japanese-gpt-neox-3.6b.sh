#!/usr/bin/env bash
#SBATCH --job-name=rinna-japanese-gpt-neox-3.6b
#SBATCH --nodes=4
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
# 4 nodes x 8 GPUs = 32 GPUs: DP 32.
#
#   sbatch slurm/pretrain_rinna-japanese-gpt-neox-3.6b.sh --save DIR --fold-file folds.yaml \
#       --tokenizer-type GPTSentencePieceTokenizer --tokenizer-model tok.model
#
# Differences from the published run: unknown, because only the architecture is published: batch
# size, precision, learning rate, and the number of GPUs are this project's.
set -euo pipefail
# sbatch runs a copy of this script; Slurm's record of the job has the path of the original.
script=$(scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null | sed -n '/^ *Command=/{s///p;q}') || true
for folder in "$(dirname "$0")/.." "$(dirname "${script%%.sh *}")/.." "${SLURM_SUBMIT_DIR:-.}"; do
    [[ -n "${MEGATRON_LLMJP:-}" || ! -f "$folder/slurm/common.sh" ]] || MEGATRON_LLMJP=$folder
done
source "${MEGATRON_LLMJP:?is not set: export it with the path of the checkout}/slurm/common.sh"
pretrain --config rinna-japanese-gpt-neox-3.6b "$@"
