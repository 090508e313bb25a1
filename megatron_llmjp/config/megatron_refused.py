"""Flags of Megatron-LM and Megatron-DeepSpeed that would change the run and cannot be honoured.

By remedy: what to do instead, and the flags.
"""

from __future__ import annotations

_BY_REMEDY: dict[str, str] = {
    # model
    "this part of a model is not implemented; leave it out if your model is without": """
        --apply-layernorm-1p --squared-relu --quick-geglu --use-fused-weighted-squared-relu
        --apply-residual-connection-post-layernorm --fp32-residual-connection
        --rotary-interleaved --no-rope-freq --qk-l2-norm
        --use-embedding-scaling --relative-attention-num-buckets
        --relative-attention-max-distance --mrope-section --window-size --window-attn-skip-freq
        --linear-attention-freq --heterogeneous-layers-config-path
        --heterogeneous-layers-config-encoded-json
        --embedding-weights-in-fp32 --onnx-safe --spec --multi-latent-attention --q-lora-rank
        --kv-lora-rank --qk-head-dim --qk-pos-emb-head-dim --v-head-dim --rotary-scaling-factor
        --mscale --mscale-all-dim --cache-mla-latents --is-hybrid-model
        --disable-mamba-mem-eff-path --softmax-type --glu-linear-offset
        --activation-func-clamp-value --attention-output-gate --experimental-attention-variant
        --linear-conv-kernel-dim --linear-key-head-dim --linear-num-key-heads
        --linear-num-value-heads --linear-value-head-dim --qk-clip --qk-clip-alpha
        --qk-clip-threshold""",
    "models that normalize queries and keys, as LLM-jp's v4 and Qwen3 do, are not implemented": """
        --qk-layernorm --apply-wd-to-qk-layernorm""",
    "recompute activations with --recompute-granularity instead of moving them": """
        --cpu-offloading-num-layers --fine-grained-activation-offloading
        --min-offloaded-tensor-size --offload-modules""",
    "use --deterministic-mode": "--batch-invariant-mode",
    "weights are drawn with --init-method-std": """
        --init-method-xavier-uniform --embedding-init-method-std --data-parallel-random-init""",
    "megatron-core's models are the only ones; leave it out": "--use-legacy-models",
    "give --num-layers": "--decoder-num-layers",
    "give --seq-length": "--decoder-seq-length --retriever-seq-length",
    "models are decoders with one pipeline; leave it out": """
        --encoder-pipeline-model-parallel-size --encoder-tensor-model-parallel-size
        --pipeline-model-parallel-split-rank""",
    "divide layers with --decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers "
    "or --pipeline-model-parallel-layout": "--pp-partition-method",
    "only GPT is pretrained here": """
        --biencoder-projection-dim --mask-factor --mask-prob --mask-type --short-seq-prob
        --ict-head-size --ict-load --bert-load --img-h --img-w --num-channels --num-classes
        --patch-dim --classes-fraction --data-per-class-fraction --iter-per-epoch
        --block-data-path --embedding-path --evidence-data-path --titles-data-path
        --indexer-batch-size --indexer-log-interval --query-in-block-prob
        --output-bert-embeddings --use-one-sent-docs --sample-rate --sft
        --sft-tokenizer-prompt-format --test-mode --inference --ds-inference
        --perform-rl-step --max-tokens-to-oom --mlp-chunks-for-prefill --refit-method""",
    "distillation is not offered; leave it out": """
        --kd --kd-alpha-ce --kd-beta-ce --kd-temp --mos --hidden-size-teacher
        --num-attention-heads-teacher --num-layers-teacher --num-experts-teacher --load-teacher
        --num-experts-switch --reset-iteration --no-load-lr-state""",
    # precision
    "train in --bf16, or --fp16": """
        --first-last-layers-bf16 --num-layers-at-start-in-bf16 --num-layers-at-end-in-bf16
        --no-fp8-wgrad --keep-fp8-transpose-cache
        --keep-fp8-transpose-cache-when-using-custom-fsdp
        --reuse-grad-buf-for-mxfp8-param-ag --kitchen-config-file --kitchen-recipe-number
        --te-precision-config-file --kitchen-attention-backend --use-kitchen-attention
        --disable-fp8-wgrad""",
    "leave it out: gradients are reduced and the loss is computed in fp32": """
        --grad-reduce-in-bf16 --fp16-lm-cross-entropy""",
    # processes
    "shard with --use-distributed-optimizer, --tensor-model-parallel-size and "
    "--pipeline-model-parallel-size": """
        --use-torch-fsdp2 --use-custom-fsdp --use-megatron-fsdp --fsdp-double-buffer
        --enable-full-sharding-in-hsdp --torch-fsdp2-no-reshard-after-forward
        --no-strict-fsdp-dtensor-load --disable-strict-fsdp-dtensor-load
        --strict-fsdp-dtensor-load --fsdp-manual-registration
        --outer-dp-sharding-strategy --remote-device --force-ds-sequence-parallel""",
    "leave it out: the optimizer runs where the model is, with fp32 state": """
        --optimizer-cpu-offload --optimizer-offload-fraction --overlap-cpu-optimizer-d2h-h2d
        --use-torch-optimizer-for-cpu-offload --no-pin-cpu-grads --no-pin-cpu-params
        --use-precision-aware-optimizer --cpu-optimizer --cpu-torch-adam""",
    "restart jobs with the scheduler that runs them; a run goes on from its newest checkpoint": """
        --adlr-autoresume --adlr-autoresume-interval --enable-ft-package --calc-ft-timeouts
        --ft-num-warmup-iters --replication --replication-factor --replication-jump""",
    "use --tensor-model-parallel-size": "--model-parallel-size",
    "use --micro-batch-size and --global-batch-size": "--batch-size",
    "use --lr-warmup-fraction": "--warmup",
    "choose --global-batch-size as a multiple of micro batch x data-parallel size": """
        --decrease-batch-size-if-needed""",
    # data
    "declare the data in a fold file and give --fold-file (docs/folds.md)": """
        --renormalize-blend-weights --mock-data --use-dataset-only
        --aml-data-download-path --phase-transition-iterations --train-data-exact-num-epochs
        --full-validation --multiple-validation-sets""",
    "the order of samples is the schedule's; inspect_dataset shows it": """
        --train-doc-idx-path --train-sample-idx-path --train-shuffle-idx-path --train-desc-path
        --train-idx-path --return-data-index""",
    "samples are whole sequences in the order of the schedule; leave it out": """
        --data-efficiency-curriculum-learning --curriculum-learning --random-ltd --fim-data
        --allow-ambiguous-pad-tokens""",
    "give --skip-iterations A-B: what is skipped is recorded and stays skipped on a resume": """
        --skip-train-iteration-range --iterations-to-skip""",
    # training
    "micro-batches weigh the same, as in Megatron-LM without it; leave it out": """
        --calculate-per-token-loss""",
    "all weights have one learning rate; leave it out": """
        --decoupled-lr --decoupled-min-lr --head-lr-mult --no-weight-decay-cond-type""",
    "end the run early with --train-iters, and give --lr-decay-iters for the schedule": """
        --force-stop-iter""",
    "profile a rank from outside, as in `nsys profile python pretrain_gpt.py ...`": """
        --profile --profile-ranks --profile-step-start --profile-step-end --use-pytorch-profiler
        --use-nsys-profiler --record-memory-history --memory-snapshot-path --nvtx-ranges
        --record-shapes""",
    "inspect weights with convert_checkpoint inspect": """
        --save-wgrads-interval --save-dgrads-interval --dump-param-to-param-group-map""",
    "--rehearse shows a layout without its GPUs": "--fake-process-group",
    # checkpoints
    "a checkpoint is always whole, to go on from; convert_checkpoint copies the weights alone": """
        --no-save-optim""",
    "convert the checkpoint with convert_checkpoint": """
        --ckpt-convert-format --ckpt-convert-save --ckpt-convert-update-legacy-dist-opt-format
        --universal-checkpoint""",
    "name the checkpoint's folder: --load SAVE/iter_0001000": "--ckpt-step",
    "save by LLM-jp's pattern with --save-policy llm-jp": "--save-iter-patterns",
    "save every so many iterations with --save-interval, and --async-save": """
        --persistent-save-interval --non-persistent-save-interval
        --non-persistent-ckpt-type --non-persistent-global-ckpt-dir
        --non-persistent-local-ckpt-dir --non-persistent-local-ckpt-algo
        --use-gcp-dynamic-checkpointing --dynamic-checkpointing-min""",
    "keep the newest with --keep-last": "--most-recent-k",
    # log
    "give a YAML file as --config FILE": "--yaml-cfg",
    "the log is plain text on standard output, metrics.jsonl and tensorboard": """
        --enable-one-logger""",
}

REFUSED: dict[str, str] = {
    flag: remedy for remedy, flags in _BY_REMEDY.items() for flag in flags.split()
}
"""A flag, and what to do instead."""

_ONLY_GPT = "only GPT is pretrained here"

REFUSED_FAMILIES: dict[str, str] = {
    "--fp8-": "train in --bf16, or --fp16",
    "--fp4-": "train in --bf16, or --fp16",
    "--muon-": "optimizers are --optimizer adam and sgd",
    "--inprocess-": "restart jobs with the scheduler that runs them",
    "--fim-": "samples are whole sequences; leave it out",
    "--mtp-": "one token is predicted; leave it out",
    "--retro-": _ONLY_GPT,
    "--vision-": _ONLY_GPT,
    "--dino-": _ONLY_GPT,
    "--swin-": _ONLY_GPT,
    "--bert-": _ONLY_GPT,
    "--biencoder-": _ONLY_GPT,
    "--retriever-": _ONLY_GPT,
    "--mamba-": _ONLY_GPT,
    "--hybrid-": _ONLY_GPT,
    "--rl-": _ONLY_GPT,
    "--grpo-": _ONLY_GPT,
    "--langrl-": _ONLY_GPT,
    "--no-rl-": _ONLY_GPT,
    "--no-langrl-": _ONLY_GPT,
    "--dsa-": "this part of a model is not implemented; leave it out if your model is without",
}
"""The beginning of a flag's name, and what to do instead of those that begin with it."""
