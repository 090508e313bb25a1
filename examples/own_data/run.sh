#!/usr/bin/env bash
# From your own files to a trained model: tokenizer, dataset, fold file, training.
source "$(dirname "$0")/../common.sh"

INPUT=${INPUT:-}     # folder or file: JSON lines, plain or compressed; empty: sample files are written
JSON_KEY=${JSON_KEY:-text}
VOCAB_SIZE=${VOCAB_SIZE:-4000}
VALIDATION_DOCUMENTS=${VALIDATION_DOCUMENTS:-5}
ITERATIONS=${ITERATIONS:-50}
TRAINING=${TRAINING:---config laptop-llama --device cpu --nproc-per-node 1}

begin own_data_output "$@"

step "The files"
if [[ -z "$INPUT" ]]; then
    INPUT=$OUTPUT/files
    run python "$EXAMPLES/own_data/write_sample_files.py" "$INPUT"
fi
run ls -l "$INPUT"

step "Tokenize: shuffled, without copies and short documents; bad lines are kept in a file of their own"
run train_tokenizer --input "$INPUT" --json-keys "$JSON_KEY" --vocab-size "$VOCAB_SIZE" \
    --output-dir "$OUTPUT/tokenizer"
tokenizer=(--tokenizer-type SentencePieceTokenizer --tokenizer-model "$OUTPUT/tokenizer/tokenizer.model")
run preprocess_data --input "$INPUT" --json-keys "$JSON_KEY" --output-prefix "$OUTPUT/own" \
    "${tokenizer[@]}" --append-eod --shuffle-seed 1 --remove-duplicates --min-characters 20 \
    --on-error quarantine
run cat "$OUTPUT/own_rejected.csv"

step "Hold out documents for validation, and read some of the others as text"
run split_folds --input "$OUTPUT/own_${JSON_KEY}_document" --output-dir "$OUTPUT/data" --folds 1 \
    --validation-documents "$VALIDATION_DOCUMENTS"
run inspect_dataset "$OUTPUT/data/fold00/own_${JSON_KEY}_document" --documents 0 -1 --max-tokens 40 \
    "${tokenizer[@]}"

step "Write a fold file, and print the plan"
run plan_folds $TRAINING --new "$OUTPUT/folds.yaml" --datasets "$OUTPUT/data/fold00" \
    --validation "$OUTPUT/data/validation" --train-iters "$ITERATIONS"
run cat "$OUTPUT/folds.yaml"

step "Train"
run pretrain_gpt $TRAINING --fold-file "$OUTPUT/folds.yaml" "${tokenizer[@]}" \
    --save "$OUTPUT/checkpoints"

step "Done"
printf '  %s\n' "$OUTPUT/own_rejected.jsonl: lines that could not be read" \
    "$OUTPUT/checkpoints: the model; resume with the same command" \
    "$OUTPUT/checkpoints/report/report.html: its curves"
