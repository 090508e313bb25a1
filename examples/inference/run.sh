#!/usr/bin/env bash
# Text from a native checkpoint with generate, and from its Hugging Face export with transformers.
source "$(dirname "$0")/../common.sh"

MODEL=${MODEL:-} # native checkpoint; empty: a small model is trained
PROMPT=${PROMPT:-The function returns}
TOKENS=${TOKENS:-20}

begin inference_output "$@"

step "The checkpoint"
if [[ -z "$MODEL" ]]; then
    run bash "$EXAMPLES/small_model.sh" "$OUTPUT/small_model"
    MODEL=$OUTPUT/small_model/checkpoints
fi

step "One prompt: greedy, then sampled"
run generate --load "$MODEL" --prompt "$PROMPT" --max-new-tokens "$TOKENS"
run generate --load "$MODEL" --prompt "$PROMPT" --max-new-tokens "$TOKENS" --temperature 0.7 --top-p 0.95

step "A file of prompts, in batches"
run generate --load "$MODEL" --input "$EXAMPLES/inference/prompts.jsonl" --output "$OUTPUT/texts.jsonl" \
    --max-new-tokens "$TOKENS" --batch-size 4
run cat "$OUTPUT/texts.jsonl"

step "A request of a text generation endpoint"
run generate --load "$MODEL" --requests "$EXAMPLES/inference/request.json"

step "The same prompts with transformers"
run convert_checkpoint --to hf --input "$MODEL" --output "$OUTPUT/model"
run python "$EXAMPLES/quickstart/generate.py" "$OUTPUT/model" "$PROMPT" --max-new-tokens "$TOKENS"
