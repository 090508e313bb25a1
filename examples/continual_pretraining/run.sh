#!/usr/bin/env bash
# Continual pretraining: a Hugging Face model in, further training on own text, a Hugging Face model out.
source "$(dirname "$0")/../common.sh"

MODEL=${MODEL:-} # Hugging Face model folder; empty: a small model of English and code is trained
TEXT=${TEXT:-$EXAMPLES/quickstart/corpus/ja.jsonl}     # JSON lines with the key "text"
REPLAY=${REPLAY:-$EXAMPLES/quickstart/corpus/en.jsonl} # text like that of the first training
ITERATIONS=${ITERATIONS:-100}
PROMPT=${PROMPT:-日本の}
TRAINING=${TRAINING:---seq-length 128 --micro-batch-size 8 --global-batch-size 16 --lr 1e-3 --device cpu}

begin continual_pretraining_output "$@"

step "The model to start from"
if [[ -z "$MODEL" ]]; then
    run bash "$EXAMPLES/small_model.sh" "$OUTPUT/small_model"
    MODEL=$OUTPUT/small_model/model
fi
run convert_checkpoint --from hf --to native --input "$MODEL" --output "$OUTPUT/start"

step "Tokenize the texts with the tokenizer of the model, and hold out five documents of each"
tokenizer=(--tokenizer-type HuggingFaceTokenizer --tokenizer-model "$MODEL")
run preprocess_data --input "$TEXT" --output-prefix "$OUTPUT/own" "${tokenizer[@]}" --append-eod
run preprocess_data --input "$REPLAY" --output-prefix "$OUTPUT/replay" "${tokenizer[@]}" --append-eod
run split_folds --input "$OUTPUT/own_text_document" "$OUTPUT/replay_text_document" \
    --output-dir "$OUTPUT/data" --folds 1 --validation-documents 5
sed "s/iterations: .*/iterations: $ITERATIONS/" "$EXAMPLES/continual_pretraining/folds.yaml" \
    >"$OUTPUT/folds.yaml"

step "Loss before"
# config.yaml in the checkpoint has the architecture.
training=(--config "$OUTPUT/start/iter_0000000/config.yaml" --fold-file "$OUTPUT/folds.yaml"
    "${tokenizer[@]}" --load "$OUTPUT/start" --finetune $TRAINING)
run pretrain_gpt "${training[@]}" --eval-only | tee "$OUTPUT/before.log"

step "Train"
run pretrain_gpt "${training[@]}" --save "$OUTPUT/checkpoints" --lr-warmup-fraction 0.1 \
    --min-lr 1e-4 | tee "$OUTPUT/training.log"

step "Convert to Hugging Face, compare the logits, generate"
run convert_checkpoint --from native --to hf --input "$OUTPUT/checkpoints" --output "$OUTPUT/model" --verify
run python "$EXAMPLES/quickstart/generate.py" "$OUTPUT/model" "$PROMPT"

step "Done: validation losses before and after"
grep -h ' validation at iteration' "$OUTPUT/before.log" "$OUTPUT/training.log"
printf '  %s\n' "$OUTPUT/model: the trained model" "$OUTPUT/checkpoints/report/report.html: its curves"
