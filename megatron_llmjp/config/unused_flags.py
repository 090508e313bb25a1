"""Flags of Megatron-LM and Megatron-DeepSpeed that are accepted, reported once, and set nothing.

Listed by reason: those that are not needed here, and those without which something is lost, such
as speed. Only flags that cannot change the trained model belong here; all others are in
``refused_flags.py``.
"""

from __future__ import annotations

_BY_REASON: dict[str, str] = {
    # model and kernels
    "only megatron-core's models are available": "--use-mcore-models --model-spec",
    "the fastest available attention is chosen and printed at the start": """
        --use-flash-attn --use-flash-attn-v1 --use-flash-attn-v2 --use-flash-attn-triton
        --attention-backend --flash-decode""",
    "softmax is always computed in fp32, inside the attention kernel": """
        --attention-softmax-in-fp32 --no-masked-softmax-fusion
        --apply-query-key-layer-scaling --no-query-key-layer-scaling""",
    "fused kernels are used where available; the result is the same": """
        --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion --no-persist-layer-norm
        --disable-mem-efficient-ln --no-gradient-accumulation-fusion --disable-jit-fuser
        --disable-bf16-reduced-precision-matmul --enable-experimental --use-te-activation-func
        --te-rng-tracker --inference-rng-tracker""",
    "cross entropy is always fused, and computed without a copy of all logits in fp32": """
        --cross-entropy-loss-fusion --cross-entropy-fusion-impl""",
    "--position-embedding-type implies it": "--no-position-embedding",
    "initial weights depend on the seed and the tensor's name only, in every layout": """
        --use-cpu-initialization --no-initialization --init-model-with-meta-device""",
    "the vocabulary is padded for the layout; --padded-vocab-size overrides it": """
        --use-tokenizer-model-from-checkpoint-args --no-use-tokenizer-model-from-checkpoint-args
        --disable-use-tokenizer-model-from-checkpoint-args""",
    "it concerns inference only": """
        --decode-only-cuda-graphs --enable-chunked-prefill --disable-chunked-prefill
        --use-legacy-static-engine --max-seqlen-per-dp-cp-rank --no-inference-wandb-logging""",
    "the tokenizer's files determine it": """
        --tokenizer-metadata --tokenizer-hf-use-fast --no-tokenizer-hf-use-fast --legacy-tokenizer
        --tokenizer-sentencepiece-legacy --trust-remote-code""",
    "preprocess_data has it: a run reads token ids": "--tokenizer-hf-include-special-tokens",
    # processes
    "ranks are read from the environment of torchrun, srun or mpirun": """
        --use-mpi --local-rank --lazy-mpu-init --standalone-embedding-stage
        --no-pipeline-parallel --split-transformers""",
    "ranks are ordered TP, CP, DP, PP": "--use-tp-pp-dp-mapping",
    "--tp-comm-overlap, which it adjusts, is not offered": """
        --disable-tp-comm-bulk-dgrad --disable-tp-comm-bulk-wgrad --disable-tp-comm-overlap-ag
        --disable-tp-comm-overlap-rs --disable-tp-comm-split-ag --disable-tp-comm-split-rs
        --no-tp-comm-bulk-dgrad --no-tp-comm-bulk-wgrad --no-tp-comm-overlap-ag
        --no-tp-comm-overlap-rs --no-tp-comm-split-ag --no-tp-comm-split-rs""",
    "communication settings are chosen automatically; the result is the same": """
        --DDP-impl --no-async-tensor-model-parallel-allreduce --no-overlap-p2p-communication
        --overlap-p2p-communication --no-scatter-gather-tensors-in-pipeline
        --scattered-embeddings --use-ring-exchange-p2p --no-contiguous-buffers-in-local-ddp
        --no-delay-grad-reduce --delay-param-gather --no-align-grad-reduce
        --no-align-param-gather --align-param-gather --ddp-bucket-size --ddp-num-buckets
        --ddp-reduce-scatter-with-fp32-accumulation --no-gradient-reduce-div-fusion
        --no-clone-scatter-output-in-embedding --disable-gloo-process-groups
        --pipeline-model-parallel-comm-backend --suggested-communication-unit-size
        --distributed-timeout-seconds-after-init --disable-async-tensor-model-parallel-allreduce
        --disable-clone-scatter-output-in-embedding""",
    "gradients of bf16 and fp16 weights are accumulated and reduced in fp32": """
        --accumulate-allreduce-grads-in-fp32""",
    "--sequence-parallel splits saved activations over the tensor-parallel ranks": """
        --distribute-saved-activations --distribute-checkpointed-activations""",
    # DeepSpeed
    "batch sizes, ZeRO and precision are set by flags, not by DeepSpeed's configuration": """
        --deepspeed --deepspeed-config --deepspeed-mpi""",
    "DeepSpeed's buffers and activation memory do not exist here": """
        --deepspeed-activation-checkpointing --synchronize-each-layer --profile-backward
        --zero-allgather-bucket-size --zero-reduce-bucket-size --zero-contigious-gradients
        --zero-reduce-scatter --use-pin-memory""",
    # data
    "samples are read without memory maps, and indices are built before ranks wait": """
        --no-mmap-bin-files --mmap-warmup --num-dataset-builder-threads --no-data-sharding
        --mid-level-dataset-surplus --dataloader-fast-cache-load
        --dataloader-defer-npy-index-mmap --per-dataset-sequences-path
        --no-create-attention-mask-in-dataloader --create-attention-mask-in-dataloader""",
    # training
    "a step whose gradient norm is not finite is always skipped": """
        --check-for-nan-in-loss --check-for-nan-in-loss-and-grad
        --no-check-for-nan-in-loss-and-grad --check-for-spiky-loss --check-for-large-grads
        --rerun-mode --error-injection-rate --error-injection-type
        --result-rejected-tracker-filename""",
    "memory is managed by PyTorch": """
        --empty-unused-memory-level --train-sync-interval""",
    "signals (SIGTERM, SIGUSR1, ..., Ctrl-C) always save a checkpoint and stop the run": """
        --exit-signal-handler --exit-signal --exit-signal-handler-for-dataloader""",
    # checkpoints
    "checkpoints are torch_dist and load in every layout; convert_checkpoint converts them": """
        --ckpt-format --dist-ckpt-format --use-dist-ckpt --auto-detect-ckpt-format
        --ckpt-fully-parallel-save --no-ckpt-fully-parallel-save
        --disable-ckpt-fully-parallel-save --ckpt-fully-parallel-load
        --ckpt-assume-constant-structure --dist-ckpt-strictness --load-model-opt-format
        --dist-ckpt-optim-fully-reshardable --distrib-optim-fully-reshardable-mem-efficient
        --dist-ckpt-save-pre-mcore-014 --use-mp-args-from-checkpoint-args
        --load-main-params-from-ckpt --save-tokenizer-assets""",
    "the checkpoint's configuration is compared with this one, and differences are reported": """
        --use-checkpoint-args""",
    "the checkpoint's learning-rate schedule is kept unless --override-opt-param-scheduler": """
        --use-checkpoint-opt-param-scheduler""",
    "--load without a complete checkpoint is always an error": "--exit-on-missing-checkpoint",
    "random state affects dropout only, and is restored in the same layout": """
        --no-load-rng --no-save-rng""",
    "--async-save always writes in threads of the ranks, without worker processes": """
        --use-persistent-ckpt-worker --async-strategy""",
    # log
    "it is always logged": """
        --log-throughput --log-batch-size-to-tensorboard --log-learning-rate-to-tensorboard
        --log-validation-ppl-to-tensorboard --log-loss-scale-to-tensorboard
        --log-memory-to-tensorboard --log-throughput-to-tensorboard --log-progress
        --no-log-learnig-rate-to-tensorboard --no-log-loss-scale-to-tensorboard
        --disable-log-loss-scale-to-tensorboard""",
    "tensorboard events are written with each log line (--log-interval)": """
        --tensorboard-log-interval --tensorboard-queue-size""",
    "Weights & Biases files are in the save folder, and restarts keep the run's name": """
        --wandb-id --wandb-save-dir""",
    "the log is plain text on standard output": """
        --logging-level --filter-warnings --modules-to-filter --set-level-for-all-loggers
        --config-logger-dir --save-config-filepath --app-tag-run-name --app-tag-run-version
        --no-one-logger --one-logger-async --run-workload-inspector-server""",
    "object stores are not supported: data and checkpoints are files": """
        --disable-msc --enable-msc --object-storage-cache-path --s3-cache-path""",
}

_NOT_OFFERED_BY_REASON: dict[str, str] = {
    # speed
    "tensor-parallel communication overlaps with weight gradients only, not within a matrix "
    "multiplication by Transformer Engine's user buffers": """
        --tp-comm-overlap --tp-comm-overlap-cfg --tp-comm-overlap-rs-dgrad
        --tp-comm-bootstrap-backend""",
    "steps are launched kernel by kernel, not as CUDA graphs": """
        --enable-cuda-graph --external-cuda-graph --cuda-graph-scope --cuda-graph-warmup-steps
        --cuda-graph-impl""",
    "NCCL communicates without registered buffers and SHARP groups": """
        --use-nccl-ub --disable-symmetric-registration --use-sharp --sharp-enabled-group
        --symmetric-ar-type --high-priority-stream-groups --create-all-gather-group""",
    "parameters are gathered during the forward pass (--overlap-param-gather), not the update": """
        --overlap-param-gather-with-optimizer-step""",
    "weight gradients are computed within the backward pass of their layer": """
        --defer-embedding-wgrad-compute --wgrad-deferral-limit --delay-wgrad-compute""",
    "the interleaved schedule overlaps communication in its steady state, in groups of the number "
    "of pipeline stages": """
        --overlap-p2p-communication-warmup-flush
        --microbatch-group-size-per-virtual-pipeline-stage""",
    "gradients are divided before they are summed, in buckets of the optimizer's padding": """
        --ddp-pad-buckets-for-high-nccl-busbw --ddp-average-in-collective""",
    "context parallelism uses Transformer Engine's default exchange": """
        --cp-comm-type --hierarchical-context-parallel-sizes""",
    # memory
    "linear layers are not split into tiles; split them with --tensor-model-parallel-size": """
        --memory-centric-tiled-linear --tile-factor""",
    "activations stay on their GPU; save memory with --sequence-parallel and "
    "--recompute-granularity": """
        --partition-activations --checkpoint-in-cpu --contigious-checkpointing""",
    # checks and logs
    "weights are not compared between replicas": """
        --check-weight-hash-across-dp-replicas-interval""",
    "stragglers are measured from the start of a run, or not at all (--no-log-straggler)": """
        --disable-straggler-on-startup""",
    "it is not logged: reading it each step would stall the GPU": """
        --log-optimizer-states-to-tensorboard --log-num-zeros-in-grad --log-timers-to-tensorboard
        --log-world-size-to-tensorboard --log-energy --log-max-attention-logit
        --log-l2-norm-grad-to-tensorboard --log-runtime-to-tensorboard --log-memory-interval
        --log-device-memory-used --memory-keys --runtime-time-unit --throughput-window-size
        --timing-log-level --timing-log-option --no-barrier-with-level-1-timing
        --barrier-with-L1-time""",
}

NOT_NEEDED: dict[str, str] = {
    flag: why for why, flags in _BY_REASON.items() for flag in flags.split()
}
"""Reason why a flag is not needed, by flag."""

NOT_NEEDED_FAMILIES: dict[str, str] = {
    "--inference-": "it concerns inference only",
    "--one-logger-": "the log is plain text on standard output",
    "--otel-": "the log is plain text on standard output",
    "--curriculum-learning-": "sequences have one length",
    "--nccl-": "NCCL is configured by its environment variables",
}
"""Reason why flags are not needed, by their prefix."""

NOT_OFFERED: dict[str, str] = {
    flag: why for why, flags in _NOT_OFFERED_BY_REASON.items() for flag in flags.split()
}
"""What the run does instead, by flag that is not offered."""

NOT_OFFERED_FAMILIES: dict[str, str] = {
    "--straggler-": "the log names the slowest rank (--log-straggler), without a control port"
}
"""What the run does instead, by prefix of flags that are not offered."""
