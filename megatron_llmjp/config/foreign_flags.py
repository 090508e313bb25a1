"""Flags of Hugging Face Trainer, DeepSpeed, torchrun and others, and what they are called here."""

from __future__ import annotations

_BY_FLAG: dict[str, str] = {
    # model
    "--num-layers": "--num-hidden-layers --n-layers --n-layer --layers --depth",
    "--hidden-size": "--d-model --n-embd --embed-dim --embedding-dim --model-dim --dim",
    "--ffn-hidden-size": "--intermediate-size --ffn-dim --ffn-size --d-ff --mlp-hidden-size",
    "--num-attention-heads": "--num-heads --n-heads --n-head --num-attn-heads --attention-heads",
    "--num-query-groups": "--num-kv-heads --n-kv-heads --num-kv-groups",
    "--kv-channels": "--head-dim --head-size",
    "--max-position-embeddings": "--max-positions --n-positions --n-ctx",
    "--activation-function": "--activation --activation-fn --hidden-act --act-fn",
    "--normalization": "--norm --norm-type --layer-norm-type",
    "--norm-epsilon": "--rms-norm-eps --layer-norm-eps --layer-norm-epsilon --norm-eps",
    "--init-method-std": "--init-std --initializer-range",
    "--position-embedding-type": "--position-embedding --pos-emb --pos-embedding-type",
    "--no-untie-embeddings-and-output-weights": "--tie-word-embeddings --tie-embeddings",
    "--vocab-size": "--vocabulary-size --n-vocab",
    # batches and length
    "--micro-batch-size": "--per-device-train-batch-size --per-gpu-train-batch-size "
    "--train-micro-batch-size-per-gpu --per-device-batch-size --device-batch-size",
    "--global-batch-size": "--train-batch-size --global-train-batch-size --total-batch-size",
    "--seq-length": "--max-seq-len --max-seq-length --seq-len --sequence-length --block-size "
    "--context-length --context-len --max-length --model-max-length",
    "--train-iters": "--max-steps --num-steps --total-steps --train-steps --num-train-steps "
    "--max-iters --num-iters --iterations --steps",
    # optimizer
    "--lr": "--learning-rate --peak-lr --max-lr --base-lr",
    "--min-lr": "--min-learning-rate --lr-min --end-lr --final-lr",
    "--lr-decay-style": "--lr-scheduler --lr-scheduler-type --scheduler --lr-schedule "
    "--learning-rate-scheduler",
    "--lr-decay-iters": "--lr-decay-steps --decay-steps --decay-iters",
    "--lr-warmup-iters": "--warmup-steps --num-warmup-steps --warmup-iters --lr-warmup-steps",
    "--lr-warmup-fraction": "--warmup-ratio --warmup-fraction --lr-warmup-ratio",
    "--optimizer": "--optim --optimizer-type --opt",
    "--weight-decay": "--wd",
    "--adam-eps": "--adam-epsilon",
    "--adam-beta1": "--beta1 --adam-beta-1",
    "--adam-beta2": "--beta2 --adam-beta-2",
    "--clip-grad": "--max-grad-norm --grad-clip --gradient-clipping --gradient-clip-val",
    "--use-distributed-optimizer": "--fsdp --zero --zero-optimization --use-zero",
    # processes
    "--tensor-model-parallel-size": "--tp --tp-size --tensor-parallel --tensor-parallel-size "
    "--tensor-parallel-degree",
    "--pipeline-model-parallel-size": "--pp --pp-size --pipeline-parallel "
    "--pipeline-parallel-size --pipeline-parallel-degree",
    "--context-parallel-size": "--cp --cp-size --context-parallel",
    "--nproc-per-node": "--num-gpus --n-gpus --nproc --num-processes --devices",
    "--recompute-granularity": "--gradient-checkpointing --activation-checkpointing "
    "--grad-checkpointing",
    # data, checkpoints, log
    "--fold-file": "--dataset --datasets --data --train-data --train-file --data-dir",
    "--tokenizer-model": "--tokenizer --tokenizer-path --tokenizer-name --tokenizer-name-or-path",
    "--save": "--output-dir --out-dir --save-dir --checkpoint-dir --ckpt-dir",
    "--load": "--resume --resume-from --resume-from-checkpoint --load-checkpoint --load-dir",
    "--save-interval": "--save-steps --save-every --checkpoint-interval",
    "--keep-last": "--save-total-limit",
    "--eval-interval": "--eval-steps --eval-every --validation-interval",
    "--eval-iters": "--eval-batches --max-eval-steps",
    "--log-interval": "--logging-steps --log-every --log-steps --print-freq",
    "--wandb-exp-name": "--run-name",
    "--config": "--model --model-name --model-name-or-path --preset",
}

_ADVICE: dict[str, str] = {
    "--gradient-accumulation-steps": "it follows from --global-batch-size, which is "
    "--micro-batch-size x data-parallel size x accumulation steps",
    "--num-train-epochs": "give `epochs` to a fold in the fold file (docs/folds.md)",
    "--mixed-precision": "give --bf16 or --fp16",
    "--report-to": "give --wandb-project, or --tensorboard-dir",
    "--nnodes": "it is torchrun's: give it before pretrain_gpt.py, or leave it out",
}

_SAME: dict[str, str] = {
    "--gradient-accumulation-steps": "--grad-accum --grad-accum-steps --accumulate-grad-batches "
    "--gradient-accumulation",
    "--num-train-epochs": "--epochs --num-epochs --max-epochs --train-epochs",
    "--mixed-precision": "--dtype --torch-dtype --precision --amp --model-dtype",
    "--nnodes": "--nnode --node-rank --master-addr --master-port --rdzv-backend --rdzv-endpoint "
    "--rdzv-id --standalone --num-nodes --num-machines",
}

FOREIGN: dict[str, str] = {
    **{other: f"did you mean '{flag}'?" for flag, s in _BY_FLAG.items() for other in s.split()},
    **_ADVICE,
    **{other: _ADVICE[flag] for flag, s in _SAME.items() for other in s.split()},
}
"""A flag that other programs have, and what to give instead."""
