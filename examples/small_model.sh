#!/usr/bin/env bash
# A small model for the examples, trained for a minute: small_model.sh [OUTPUT]
#
# English and code of the quickstart's corpus, a tokenizer, a LLaMA of 1.9 M parameters. Writes
# OUTPUT/model (Hugging Face) and OUTPUT/corpus.
source "$(dirname "$0")/common.sh"
ITERATIONS=${MODEL_ITERATIONS:-150}

begin small_model_output "$@"
run python "$EXAMPLES/quickstart/make_corpus.py" --output-dir "$OUTPUT/corpus"
run train_tokenizer --input "$OUTPUT"/corpus/{ja,en,code}.jsonl --vocab-size 4096 \
    --max-input-mb 2 --output-dir "$OUTPUT/tokenizer"
for name in en code; do
    run preprocess_data --input "$OUTPUT/corpus/$name.jsonl" --output-prefix "$OUTPUT/data/$name" \
        --tokenizer-type SentencePieceTokenizer --tokenizer-model "$OUTPUT/tokenizer/tokenizer.model" \
        --append-eod
done
run pretrain_gpt --config laptop-llama --device cpu --nproc-per-node 1 --train-iters "$ITERATIONS" \
    --data-path 1 "$OUTPUT/data/en_text_document" 2 "$OUTPUT/data/code_text_document" --split 100,0,0 \
    --tokenizer-type SentencePieceTokenizer --tokenizer-model "$OUTPUT/tokenizer/tokenizer.model" \
    --save "$OUTPUT/checkpoints"
run convert_checkpoint --to hf --input "$OUTPUT/checkpoints" --output "$OUTPUT/model" \
    --tokenizer "$OUTPUT/tokenizer"
