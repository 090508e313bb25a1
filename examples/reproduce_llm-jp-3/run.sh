#!/usr/bin/env bash
# The published runs of llm-jp-3: fold schedule and rehearsal, on any machine and without data.
source "$(dirname "$0")/../common.sh"

MODELS=${MODELS:-1.8b 13b 172b} # also 150m 440m 980m 3.7b 7.2b
FOLD_FILE=${FOLD_FILE:-$EXAMPLES/reproduce_llm-jp-3/folds.yaml}
export STEPS=$((2 * $(wc -w <<<"$MODELS")))

for model in $MODELS; do
    script=$REPOSITORY/slurm/pretrain_llm-jp-3-$model.sh # with the published number of GPUs
    step "llm-jp-3-$model: the plan"
    run plan_folds --config "llm-jp-3-$model" --fold-file "$FOLD_FILE"

    step "llm-jp-3-$model: the rehearsal, on the GPUs of the job script"
    run bash "$script" --estimate --fold-file "$FOLD_FILE"

    printf '\n  on a cluster with the data:\n  $ sbatch %s --save checkpoints --fold-file %s \\\n      %s\n' \
        "$script" "$FOLD_FILE" \
        "--tokenizer-type Llama2Tokenizer --tokenizer-model llm-jp-tokenizer-100k.ver3.0b1.model"
done
