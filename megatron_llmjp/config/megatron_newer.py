"""Flags of Megatron-LM releases newer than the megatron-core that is used here.

By the first megatron-core release whose argument parser has them.
"""

from __future__ import annotations

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
"""A flag, and the megatron-core release that it came with."""
