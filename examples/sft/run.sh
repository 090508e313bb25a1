#!/usr/bin/env bash
# Supervised fine-tuning with TRL and PEFT: all parameters, and LoRA; merged and reloaded.
source "$(dirname "$0")/../common.sh"
require trl peft datasets
export PYTHONWARNINGS=ignore HF_DATASETS_DISABLE_PROGRESS_BARS=1

MODEL=${MODEL:-} # Hugging Face model folder, or a checkpoint; empty: a small model is trained
DATA=${DATA:-$EXAMPLES/sft/conversations.jsonl}
CHAT_TEMPLATE=${CHAT_TEMPLATE:-$EXAMPLES/sft/chat_template.jinja}
TRAINING=${TRAINING:---max-steps 60 --max-length 128}
PROMPT=${PROMPT:-日本の首都はどこですか。}

begin sft_output "$@"

step "The model, as a Hugging Face folder with a chat template"
if [[ -z "$MODEL" ]]; then
    run bash "$EXAMPLES/small_model.sh" "$OUTPUT/small_model"
    MODEL=$OUTPUT/small_model/checkpoints
fi
run convert_checkpoint --to hf --input "$MODEL" --chat-template "$CHAT_TEMPLATE" --output "$OUTPUT/base"

step "Train all parameters"
run python "$EXAMPLES/sft/sft.py" --model "$OUTPUT/base" --data "$DATA" --output "$OUTPUT/full" $TRAINING
run python "$EXAMPLES/sft/chat.py" "$OUTPUT/full" "$PROMPT"

step "Train a LoRA adapter"
run python "$EXAMPLES/sft/sft.py" --model "$OUTPUT/base" --data "$DATA" --output "$OUTPUT/adapter" \
    $TRAINING --lora --learning-rate 1e-2

step "Merge the adapter, reload, and compare with base and adapter in PEFT"
run convert_checkpoint --to hf --input "$OUTPUT/base" --adapter "$OUTPUT/adapter" --output "$OUTPUT/merged"
run python "$EXAMPLES/sft/chat.py" "$OUTPUT/merged" --base "$OUTPUT/base" --adapter "$OUTPUT/adapter" "$PROMPT"

step "Back to a native checkpoint, to train further: --load $OUTPUT/native --finetune"
run convert_checkpoint --to native --input "$OUTPUT/full" --output "$OUTPUT/native"
run convert_checkpoint inspect "$OUTPUT/full" "$OUTPUT/native"

step "Done"
printf '  %s\n' "$OUTPUT/full: all parameters tuned" "$OUTPUT/adapter, $OUTPUT/merged: LoRA"
