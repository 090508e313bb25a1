#!/usr/bin/env bash
# Evaluation: validation perplexity per dataset, and a local task of lm-evaluation-harness.
source "$(dirname "$0")/../common.sh"
require lm_eval
export PYTHONWARNINGS=ignore

MODEL=${MODEL:-} # Hugging Face model folder; empty: a small model is trained
TEXTS=${TEXTS:-$EXAMPLES/quickstart/corpus/ja.jsonl $EXAMPLES/quickstart/corpus/en.jsonl}
TASKS=${TASKS:-$EXAMPLES/evaluation/tasks} # folder of task files
TASK=${TASK:-completions}
DEVICE=${DEVICE:-cpu}

begin evaluation_output "$@"
OUTPUT=$(cd "$OUTPUT" && pwd)

step "The model, in both formats"
if [[ -z "$MODEL" ]]; then
    run bash "$EXAMPLES/small_model.sh" "$OUTPUT/small_model"
    MODEL=$OUTPUT/small_model/model
fi
run convert_checkpoint --to native --input "$MODEL" --output "$OUTPUT/native"

step "Perplexity per dataset: each file of TEXTS is a validation set"
sets=""
for text in $TEXTS; do
    name=$(basename "$text" .jsonl)
    run preprocess_data --input "$text" --output-prefix "$OUTPUT/data/$name" --append-eod \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$MODEL"
    sets="$sets  $name: {path: data/${name}_text_document}"$'\n'
done
# A fold file needs a fold, which --eval-only does not train on.
printf 'folds: [{name: unused, iterations: 1, blend: {%s: {path: %s, weight: 1, repeat: true}}}]\nvalidation:\n%s' \
    "$name" "data/${name}_text_document" "$sets" >"$OUTPUT/folds.yaml"
run pretrain_gpt --config "$OUTPUT/native/iter_0000000/config.yaml" --load "$OUTPUT/native" --finetune \
    --eval-only --eval-iters 1000 --micro-batch-size 8 --global-batch-size 8 --device "$DEVICE" \
    --fold-file "$OUTPUT/folds.yaml" --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$MODEL" |
    tee "$OUTPUT/perplexity.log"

step "A task of lm-evaluation-harness"
cp -r "$TASKS" "$OUTPUT/tasks"
sed "s|FOLDER|$OUTPUT/tasks|" "$TASKS/$TASK.yaml" >"$OUTPUT/tasks/$TASK.yaml"
run python -m lm_eval --model hf --model_args "pretrained=$MODEL,dtype=float32" --tasks "$TASK" \
    --include_path "$OUTPUT/tasks" --device "$DEVICE" --output_path "$OUTPUT/results"

step "Done"
grep ' validation at iteration' "$OUTPUT/perplexity.log"
printf '  %s\n' "$OUTPUT/results: accuracy of the task"
