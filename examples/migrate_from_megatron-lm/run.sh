#!/usr/bin/env bash
# A Megatron-LM run brought over: its launch script and its checkpoint, continued at the next iteration.
source "$(dirname "$0")/../common.sh"
source "$EXAMPLES/migrate.sh"

export CHECKPOINT=${CHECKPOINT:-} # a run's folder, or an iteration in it; empty: one is made in the same format
export SCRIPT=${SCRIPT:-$EXAMPLES/migrate_from_megatron-lm/train_here.sh}
export WORLD_SIZE=${WORLD_SIZE:-1} # number of processes of the dry run
export DRY_RUN_ONLY=${DRY_RUN_ONLY:-} # 1: stop before training

begin migrate_from_megatron-lm_output "$@"
migrate megatron-lm Llama2Tokenizer '</s>'
