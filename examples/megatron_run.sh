#!/usr/bin/env bash
# A run for the examples migrate_from_*: megatron_run.sh OUTPUT SCRIPT TOKENIZER_TYPE EOD_TOKEN
#
# Writes data/, tokenizer/ and native/: all iterations of SCRIPT, with a checkpoint of iteration 10.
source "$(dirname "$0")/common.sh"
[[ $# -eq 4 ]] || fail "usage: $0 OUTPUT SCRIPT TOKENIZER_TYPE EOD_TOKEN"

begin unused "$1"
cd "$OUTPUT"
run train_tokenizer --input "$EXAMPLES"/quickstart/corpus/{ja,en}.jsonl --vocab-size 2000 \
    --eod-token "$4" --output-dir tokenizer
for language in ja en; do
    run preprocess_data --input "$EXAMPLES/quickstart/corpus/$language.jsonl" \
        --output-prefix "data/$language" --append-eod --tokenizer-type "$3" \
        --tokenizer-model tokenizer/tokenizer.model
done
CHECKPOINT_DIR=native run bash "$2" | tee training.log
