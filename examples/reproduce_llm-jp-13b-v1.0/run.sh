#!/usr/bin/env bash
# The published run of llm-jp-13b-v1.0: fold schedule and rehearsal, on any machine and without data.
source "$(dirname "$0")/../common.sh"

FOLD_FILE=${FOLD_FILE:-$EXAMPLES/reproduce_llm-jp-13b-v1.0/folds.yaml}
SCRIPT=$REPOSITORY/slurm/pretrain_llm-jp-13b-v1.0.sh # 12 nodes of 8 A100 40 GB, as published

step "The plan: ten folds and a refined fold"
run plan_folds --config llm-jp-13b-v1.0 --fold-file "$FOLD_FILE"

step "The rehearsal: memory, communication and days on the GPUs of the job script"
run bash "$SCRIPT" --estimate --fold-file "$FOLD_FILE"

step "The job, on a cluster with the data"
printf '  $ sbatch %s --save checkpoints --fold-file %s \\\n      %s\n' "$SCRIPT" "$FOLD_FILE" \
    "--tokenizer-type SentencePieceTokenizer --tokenizer-model code10k_en20k_ja30k.ver2.1.model"
