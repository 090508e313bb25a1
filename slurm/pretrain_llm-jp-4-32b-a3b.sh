#!/usr/bin/env bash
#SBATCH --job-name=llm-jp-4-32b-a3b
#SBATCH --nodes=16
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
# 16 nodes x 8 H200 = 128 GPUs: DP 128, EP 4, global batch 1024. First phase of the pretraining.
#
#   sbatch slurm/pretrain_llm-jp-4-32b-a3b.sh --save DIR --fold-file folds.yaml \
#       --tokenizer-type Llama2Tokenizer --tokenizer-model tok.model
#
# Differences from the published run: the fastest attention kernel is selected (published:
# --attention-backend flash, which NVTE_FUSED_ATTN=0 before sbatch selects); fold files and their
# validation sets instead of one blend without validation.
# PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True is set by all job scripts. LLM-jp's jobs ran
# under PBS on ABCI 3.0; their number of nodes is not published.
set -euo pipefail
GPU=${GPU:-H200} # for --estimate
# sbatch runs a copy of this script; Slurm's record of the job has the path of the original.
script=$(scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null | sed -n '/^ *Command=/{s///p;q}') || true
for folder in "$(dirname "$0")/.." "$(dirname "${script%%.sh *}")/.." "${SLURM_SUBMIT_DIR:-.}"; do
    [[ -n "${MEGATRON_LLMJP:-}" || ! -f "$folder/slurm/common.sh" ]] || MEGATRON_LLMJP=$folder
done
source "${MEGATRON_LLMJP:?is not set: export it with the path of the checkout}/slurm/common.sh"
pretrain --config llm-jp-4-32b-a3b "$@"
