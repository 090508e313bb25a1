"""Flags of other programs that are refused, each with the reason and what to use instead.

- Flags of Megatron-LM and Megatron-DeepSpeed that would change the run and are not supported.
- Flags of Megatron-LM releases newer than the installed megatron-core, by the first release that
  has them.
- Flags of Hugging Face Trainer, DeepSpeed, torchrun and others, with their equivalents here.
"""

from __future__ import annotations

_BY_REMEDY: dict[str, str] = {
    # model
    "this part of a model is not implemented; remove it if your model does not use it": """
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
    "norms, those of queries and keys too, have no weight decay": "--apply-wd-to-qk-layernorm",
    "recompute activations with --recompute-granularity instead of moving them": """
        --cpu-offloading-num-layers --fine-grained-activation-offloading
        --min-offloaded-tensor-size --offload-modules""",
    "use --deterministic-mode": "--batch-invariant-mode",
    "initial weights are set by --init-method-std": """
        --init-method-xavier-uniform --embedding-init-method-std --data-parallel-random-init""",
    "only megatron-core's models are available; remove it": "--use-legacy-models",
    "pass --num-layers": "--decoder-num-layers",
    "pass --seq-length": "--decoder-seq-length --retriever-seq-length",
    "models are decoders with one pipeline; remove it": """
        --encoder-pipeline-model-parallel-size --encoder-tensor-model-parallel-size
        --pipeline-model-parallel-split-rank""",
    "set the stages with --decoder-first-pipeline-num-layers, --decoder-last-pipeline-num-layers "
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
    "distillation is not supported; remove it": """
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
    "remove it: gradients are reduced and the loss is computed in fp32": """
        --grad-reduce-in-bf16 --fp16-lm-cross-entropy""",
    # processes
    "shard with --use-distributed-optimizer, --tensor-model-parallel-size and "
    "--pipeline-model-parallel-size": """
        --use-torch-fsdp2 --use-custom-fsdp --use-megatron-fsdp --fsdp-double-buffer
        --enable-full-sharding-in-hsdp --torch-fsdp2-no-reshard-after-forward
        --no-strict-fsdp-dtensor-load --disable-strict-fsdp-dtensor-load
        --strict-fsdp-dtensor-load --fsdp-manual-registration
        --outer-dp-sharding-strategy --remote-device --force-ds-sequence-parallel""",
    "remove it: the optimizer runs on the model's device, with fp32 state": """
        --optimizer-cpu-offload --optimizer-offload-fraction --overlap-cpu-optimizer-d2h-h2d
        --use-torch-optimizer-for-cpu-offload --no-pin-cpu-grads --no-pin-cpu-params
        --use-precision-aware-optimizer --cpu-optimizer --cpu-torch-adam""",
    "restart jobs with the job scheduler; a run resumes from its newest checkpoint": """
        --adlr-autoresume --adlr-autoresume-interval --enable-ft-package --calc-ft-timeouts
        --ft-num-warmup-iters --replication --replication-factor --replication-jump""",
    "use --tensor-model-parallel-size": "--model-parallel-size",
    "use --micro-batch-size and --global-batch-size": "--batch-size",
    "use --lr-warmup-fraction": "--warmup",
    "choose --global-batch-size as a multiple of micro batch x data-parallel size": """
        --decrease-batch-size-if-needed""",
    # data
    "define the data in a fold file and pass --fold-file (docs/folds.md)": """
        --renormalize-blend-weights --mock-data --use-dataset-only
        --aml-data-download-path --phase-transition-iterations --train-data-exact-num-epochs
        --full-validation --multiple-validation-sets""",
    "the fold schedule determines the sample order; inspect_dataset shows it": """
        --train-doc-idx-path --train-sample-idx-path --train-shuffle-idx-path --train-desc-path
        --train-idx-path --return-data-index""",
    "samples are whole sequences in the order of the fold schedule; remove it": """
        --data-efficiency-curriculum-learning --curriculum-learning --random-ltd --fim-data
        --allow-ambiguous-pad-tokens""",
    "pass --skip-iterations A-B: skipped samples are recorded and stay skipped on resume": """
        --skip-train-iteration-range --iterations-to-skip""",
    # training
    "micro-batches have equal weights, as in Megatron-LM without it; remove it": """
        --calculate-per-token-loss""",
    "all weights have the same learning rate; remove it": """
        --decoupled-lr --decoupled-min-lr --head-lr-mult --no-weight-decay-cond-type""",
    "end the run early with --train-iters, and set --lr-decay-iters for the schedule": """
        --force-stop-iter""",
    "--profile without --use-pytorch-profiler starts and stops nsys": "--use-nsys-profiler",
    "inspect weights with convert_checkpoint inspect": """
        --save-wgrads-interval --save-dgrads-interval --dump-param-to-param-group-map""",
    "--estimate computes memory and time of a layout without GPUs": "--fake-process-group",
    # checkpoints
    "checkpoints always include the optimizer; convert_checkpoint exports the weights only": """
        --no-save-optim""",
    "convert the checkpoint with convert_checkpoint": """
        --ckpt-convert-format --ckpt-convert-save --ckpt-convert-update-legacy-dist-opt-format
        --universal-checkpoint""",
    "pass the checkpoint's folder: --load SAVE/iter_0001000": "--ckpt-step",
    "save at LLM-jp's iterations with --save-policy llm-jp": "--save-iter-patterns",
    "non-persistent checkpoints are in the folder of the others, --save": """
        --non-persistent-global-ckpt-dir --non-persistent-local-ckpt-dir
        --non-persistent-local-ckpt-algo""",
    "use --save-interval": "--persistent-save-interval",
    "a run that receives a signal saves and stops; use --non-persistent-save-minutes": """
        --use-gcp-dynamic-checkpointing --dynamic-checkpointing-min""",
    "use --keep-last": "--most-recent-k",
    # log
    "pass a YAML file as --config FILE": "--yaml-cfg",
    "logs are plain text on standard output, metrics.jsonl and TensorBoard events": """
        --enable-one-logger""",
}

REFUSED: dict[str, str] = {
    flag: remedy for remedy, flags in _BY_REMEDY.items() for flag in flags.split()
}
"""Remedy by flag."""

_ONLY_GPT = "only GPT is pretrained here"

REFUSED_FAMILIES: dict[str, str] = {
    "--fp8-": "train in --bf16, or --fp16",
    "--fp4-": "train in --bf16, or --fp16",
    "--muon-": "optimizers are --optimizer adam and sgd",
    "--inprocess-": "restart jobs with the job scheduler",
    "--fim-": "samples are whole sequences; remove it",
    "--mtp-": "multi-token prediction is not supported; remove it",
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
    "--dsa-": "this part of a model is not implemented; remove it if your model does not use it",
}
"""Remedy by prefix of a flag."""


_BY_RELEASE: dict[str, str] = {
    "0.17": """
        --async-ckpt-cpu-priority --async-ckpt-io-priority
        --ckpt-fully-parallel-load-exchange-algo --ckpt-fully-parallel-load-process-group
        --ckpt-fully-parallel-save-process-group --cpu-offloading-retain-pinned-cpu-buffers
        --ddp-param-name-patterns-for-fp32-local-accumulation --disable-align-grad-reduce
        --disable-flight-recorder-dump-on-timeout --disable-flight-recorder-extra-dump-on-exec
        --disable-flight-recorder-include-only-active --dist-ckpt-workers
        --exit-signal-handler-for-training --flight-recorder-dump-path
        --flight-recorder-include-stack-trace --flight-recorder-trace-buffer-size
        --fused-residual-rmsnorm --lion-beta1 --lion-beta2 --megatron-fsdp-grad-comm-dtype
        --megatron-fsdp-main-grads-dtype --megatron-fsdp-main-params-dtype
        --mla-down-proj-fusion --mup-attn-scale-power --mup-base-head-dim --mup-base-hidden-size
        --mup-embedding-mult --mup-output-mult --mup-width-mult
        --no-flight-recorder-dump-on-timeout --no-flight-recorder-extra-dump-on-exec
        --no-flight-recorder-include-only-active --no-inference-dynamic-batching-prefix-caching
        --no-inference-text-gen-server-logging --no-inference-use-synchronous-zmq-collectives
        --num-speculative-tokens --optimizer-cuda-graph --pytorch-profiler-collect-callstack
        --pytorch-profiler-collect-chakra --pytorch-profiler-collect-shapes
        --tokenizer-hf-no-include-special-tokens --tokenizer-hf-no-use-fast --use-mup
        --verify-integrity""",
    "0.18": """
        --async-ckpt-use-cpu-shm --chat-template --cuda-graph-modules
        --disable-ckpt-load-validate-sharding-integrity --disable-pad-vocab-size
        --disable-tokenizer-sentencepiece-ignore-extra-whitespaces --eval-global-batch-size
        --eval-micro-batch-size --fault-injector-delay-start-iteration
        --fault-injector-fault-delay --fault-injector-fault-probabilities
        --fault-injector-fault-types --fault-injector-mtti-seconds --fault-injector-num-ranks
        --fault-injector-offset-seconds --fault-injector-ranks --fault-injector-seed
        --fine-grained-offloading-max-inflight-offloads --gpu-sniff-test-interval
        --high-priority-a2a-comm-stream --megatron-fsdp-enable-fine-grained-param-gather
        --mlp-chunks-for-training --no-ckpt-load-validate-sharding-integrity
        --no-inference-disable-ep-consensus --no-pad-vocab-size
        --no-tokenizer-sentencepiece-ignore-extra-whitespaces --no-use-layer-wise-param-layout
        --null-tokenizer-eod-id --null-tokenizer-pad-id
        --overlap-dispatch-backward-with-experts-wgrad --save-activations-interval
        --save-params-interval --save-tokens-per-expert-interval --start-eval-at-iter
        --step-batch-size-schedule --use-grouped-gemm-for-dense-mlp
        --use-transformer-engine-op-fuser --validation-set-names""",
    "0.19": """
        --activation-offload-fraction --dataloader-inter-document-masking
        --delay-offload-until-cuda-graph --delta-offload-bytes-across-pp-ranks
        --disable-dsa-indexer-rotate-activation --disable-dsa-indexer-scoring-relu
        --disable-stream-ckpt-dequant --expert-tensor-parallel-num-weight-shards
        --flash-attention-version --freeze-all-layers --fsdp-db-use-persist-buf-on-alloc-fail
        --logits-load-decode-threads --logits-load-dir --logits-load-ignore-errors
        --logits-load-kd-loss-alpha --logits-load-msc-prefetch-depth
        --logits-load-prefetch-factor --logits-save-dir --logits-save-dtype --logits-save-top-k
        --logits-save-top-p --logits-save-top-p-min-k --megatron-fsdp-max-pool-double-buffer
        --no-dsa-indexer-rotate-activation --no-dsa-indexer-scoring-relu
        --no-stream-ckpt-dequant
        --override-ckpt-iteration --tensor-parallel-num-weight-shards
        --use-grouped-gemm-for-shared-expert --use-same-sampling-seed-across-dp-ranks""",
    "0.20": """
        --batch-invariant-backend --ckpt-drop-redundant-extra-state
        --ckpt-fully-parallel-load-per-rank-objects --ckpt-pg-tensors-cache-create
        --ckpt-pg-tensors-cache-path --disable-save-tokenizer-assets --enable-mhc-connections
        --gdp-cutedsl-kernel --gdp-num-chunk-states-to-recompute --gdp-num-householder
        --gtp-expert-remat-nccl-ub --gtp-remat-nccl-ub --gtp-remat-opt-in-modules
        --gtp-remat-reduce-scatter-with-fp32-accumulation --megatron-fsdp-version
        --mhc-init-gating-factor --mhc-num-residual-streams --mhc-recompute-layer-num
        --mhc-sinkhorn-iterations --no-save-tokenizer-assets --output-logit-dtype
        --use-gigatoken""",
}

NEWER: dict[str, str] = {
    flag: release for release, flags in _BY_RELEASE.items() for flag in flags.split()
}
"""First megatron-core release that has a flag, by flag."""


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
    "--device": "--use-cpu --no-cuda --accelerator --device-type",
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
    "--gradient-accumulation-steps": "set --global-batch-size: it is --micro-batch-size x "
    "data-parallel size x accumulation steps",
    "--num-train-epochs": "set `epochs` of a fold in the fold file (docs/folds.md)",
    "--mixed-precision": "pass --bf16 or --fp16",
    "--report-to": "pass --wandb-project or --tensorboard-dir",
    "--nnodes": "it is a flag of torchrun: place it before pretrain_gpt.py, or remove it",
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
"""What to use instead, by flag of another program."""
