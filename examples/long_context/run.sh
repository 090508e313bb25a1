#!/usr/bin/env bash
# Long context: a Hugging Face model in, training on longer sequences, a Hugging Face model out.
source "$(dirname "$0")/../common.sh"

MODEL=${MODEL:-} # Hugging Face model folder; empty: a small model of 128 positions is trained
TEXT=${TEXT:-}   # JSON lines with the key "text", long documents; empty: Python's standard library
LENGTH=${LENGTH:-1024}
SCALING=${SCALING:---position-embedding-type yarn --yarn-rotary-scaling-factor 8
    --yarn-original-max-position-embeddings 128}
ITERATIONS=${ITERATIONS:-60}
TRAINING=${TRAINING:---micro-batch-size 1 --global-batch-size 8 --lr 1e-3 --min-lr 1e-4 --device cpu}
LAYOUT=${LAYOUT:---nproc-per-node 2 --context-parallel-size 2}
VERIFY_LENGTH=${VERIFY_LENGTH:-$LENGTH}
SAMPLES=${SAMPLES:-8} # documents on which the losses by position are computed

begin long_context_output "$@"

step "The model to start from"
if [[ -z "$MODEL" ]]; then
    run bash "$EXAMPLES/small_model.sh" "$OUTPUT/small_model"
    MODEL=$OUTPUT/small_model/model
fi
run convert_checkpoint --from hf --to native --input "$MODEL" --output "$OUTPUT/start"

step "Tokenize long documents, and hold out some"
if [[ -z "$TEXT" ]]; then
    run python "$EXAMPLES/quickstart/make_corpus.py" --output-dir "$OUTPUT/corpus"
    TEXT=$OUTPUT/corpus/code.jsonl
fi
tokenizer=(--tokenizer-type HuggingFaceTokenizer --tokenizer-model "$MODEL")
run preprocess_data --input "$TEXT" --output-prefix "$OUTPUT/long" "${tokenizer[@]}" --append-eod
run split_folds --input "$OUTPUT/long_text_document" --output-dir "$OUTPUT/data" --folds 1 \
    --validation-documents 40

step "Train on sequences of $LENGTH tokens, each divided over the ranks of a context-parallel group"
# The checkpoint provides the architecture; --finetune allows other positions and frequencies.
run pretrain_gpt --load "$OUTPUT/start" --finetune --seq-length "$LENGTH" \
    --max-position-embeddings "$LENGTH" $SCALING $LAYOUT $TRAINING --train-iters "$ITERATIONS" \
    --lr-warmup-fraction 0.1 --data-path 1 "$OUTPUT/data/fold00/long_text_document" --split 100,0,0 \
    --save "$OUTPUT/checkpoints" | tee "$OUTPUT/training.log"

step "Convert to Hugging Face, and compare the logits of $VERIFY_LENGTH tokens"
run convert_checkpoint --from native --to hf --input "$OUTPUT/checkpoints" --output "$OUTPUT/model" \
    --verify --verify-length "$VERIFY_LENGTH"

step "Losses by position before and after, with transformers and with the checkpoint itself"
run python "$EXAMPLES/long_context/loss_by_position.py" \
    --dataset "$OUTPUT/data/validation/long_text_document" --length "$LENGTH" --samples "$SAMPLES" \
    --before "$MODEL" --after "$OUTPUT/model" --native "$OUTPUT/checkpoints"
printf '  %s\n' "$OUTPUT/model: the trained model" "$OUTPUT/checkpoints/report/report.html: its curves"
