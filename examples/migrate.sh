# shellcheck shell=bash
# Steps of the examples migrate_from_*; sourced after common.sh.

# Iterations and losses in a log.
losses() { sed -nE 's/.* iteration +([0-9]+)\/.* lm loss: ([^ ]+) .*/\1 \2/p' "$1"; }

# migrate FORMAT TOKENIZER_TYPE EOD_TOKEN: the last two for the run that is made without CHECKPOINT.
migrate() {
    local format=$1
    export STEPS=7
    [[ -z "$DRY_RUN_ONLY" ]] || STEPS=4
    OUTPUT=$(cd "$OUTPUT" && pwd)

    step "The run to bring over"
    if [[ -z "$CHECKPOINT" ]]; then
        run bash "$EXAMPLES/megatron_run.sh" "$OUTPUT/old" "$SCRIPT" "$2" "$3"
        run convert_checkpoint --to "$format" --with-optimizer \
            --input "$OUTPUT/old/native/iter_0000010" --output "$OUTPUT/old/checkpoints"
        CHECKPOINT=$OUTPUT/old/checkpoints
        cd "$OUTPUT/old" # the paths in the script are relative to it
    fi

    step "The launch script: what was changed"
    diff "$EXAMPLES/migrate_from_$format/train.sh" "$SCRIPT" || true

    step "Convert the checkpoint: weights, Adam's moments, learning-rate schedule, consumed samples"
    run convert_checkpoint inspect "$CHECKPOINT"
    run convert_checkpoint --to native --with-optimizer --input "$CHECKPOINT" \
        --output "$OUTPUT/checkpoints"

    step "Check the flags: notes name those without effect; a refused flag would be an error"
    export CHECKPOINT_DIR=$OUTPUT/checkpoints
    run bash "$SCRIPT" --dry-run --world-size "$WORLD_SIZE" | tee "$OUTPUT/dry_run.yaml" | grep '^ *[$#]'

    if [[ -n "$DRY_RUN_ONLY" ]]; then
        printf '\nChecked, not trained. Start the run:\n  cd%s && env%s bash%s\n' \
            "$(quoted "$PWD")" "$(quoted "CHECKPOINT_DIR=$CHECKPOINT_DIR")" "$(quoted "$SCRIPT")"
        return
    fi
    step "Continue the run"
    run bash "$SCRIPT" | tee "$OUTPUT/training.log"

    step "And back: a checkpoint from which the other program resumes"
    run convert_checkpoint --to "$format" --with-optimizer --input "$OUTPUT/checkpoints" \
        --output "$OUTPUT/for-$format"

    step "Done: losses"
    if [[ -e "$OUTPUT/old/training.log" ]]; then
        printf '  iteration, loss of the uninterrupted run, loss of the run brought over\n'
        awk 'NR == FNR { old[$1] = $2; next } $1 in old { print "  " $1, old[$1], $2 }' \
            <(losses "$OUTPUT/old/training.log") <(losses "$OUTPUT/training.log")
    else
        losses "$OUTPUT/training.log" | sed 's/^/  /'
    fi
}
