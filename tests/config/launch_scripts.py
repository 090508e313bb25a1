"""Arguments that LLM-jp's published launch scripts pass to pretrain_gpt.py, without their paths.

Flags and values only, of: llm-jp/Megatron-DeepSpeed branch llmjp0/dev (scripts/deepspeed, with the
batch sizes and tokenizer of the published runs), llm-jp/Megatron-LM branch llmjp0-mdx (scripts/mdx,
v2), llm-jp/scripts (pretrain/scripts/v3-*-sakura and v4-*). The blends of the originals have up to
139 datasets.
"""

from __future__ import annotations

from dataclasses import dataclass

BLEND = "0.5 data/ja_text_document 0.5 data/en_text_document"


GPT2_BPE = """
    --override-opt_param-scheduler --adam-beta1 0.9 --adam-beta2 0.95
    --tensor-model-parallel-size 1 --init-method-std 0.013 --lr-decay-tokens 300000000000
    --lr-warmup-tokens 3000000000 --micro-batch-size 2 --exit-duration-in-mins 30000000
    --global-batch-size 512 --num-layers 24 --hidden-size 2048 --num-attention-heads 16
    --seq-length 2048 --max-position-embeddings 2048 --train-tokens 300000000000
    --train-samples 292968750 --lr 2.0e-4 --min-lr 1.0e-6 --lr-decay-style cosine
    --split 949,50,1 --log-interval 1 --eval-interval 100 --eval-iters 10 --save-interval 100
    --weight-decay 0.1 --clip-grad 1.0 --hysteresis 2 --num-workers 0 --distributed-backend nccl
    --fp16 --seed 1234 --load checkpoints --save checkpoints
    --no-async-tensor-model-parallel-allreduce --use-flash-attn --tensorboard-queue-size 1
    --log-timers-to-tensorboard --log-batch-size-to-tensorboard
    --log-validation-ppl-to-tensorboard --tensorboard-dir tensorboard
    --log-optimizer-states-to-tensorboard --use-mpi --wandb-name name
    --vocab-file gpt2-vocab.json --merge-file gpt2-merges.txt --data-path data/ja_text_document
    --data-impl mmap --deepspeed --deepspeed_config ds.json --zero-stage 1
    --pipeline-model-parallel-size 1
"""
"""llm-jp/Megatron-DeepSpeed's scripts/abci/1.3B/dp16_tp1_pp1_zero1_flash_attn.sh, without a type
of tokenizer, as most of its benchmark scripts are."""


@dataclass(frozen=True)
class Script:
    """A published launch script: its arguments and the equivalent preset."""

    preset: str
    words: str
    environment: tuple[str, ...] = ()
    """Settings of Transformer Engine that the script exports."""

    @property
    def argv(self) -> list[str]:
        """Return the arguments as a list."""
        return self.words.split()


def _v1(preset: str, layers: int, hidden: int, heads: int, std: str, lr: str, pp: int, mbs: int):
    return Script(
        preset,
        f"""
        --override-opt_param-scheduler --adam-beta1 0.9 --adam-beta2 0.95
        --tensor-model-parallel-size 1 --init-method-std {std} --lr-decay-tokens 300000000000
        --lr-warmup-tokens 3000000000 --micro-batch-size {mbs} --exit-duration-in-mins 30000000
        --global-batch-size 1536 --num-layers {layers} --hidden-size {hidden}
        --num-attention-heads {heads} --seq-length 2048 --max-position-embeddings 2048
        --train-tokens 300000000000 --train-samples 292968750 --lr {lr} --min-lr 1.0e-6
        --lr-decay-style cosine --split 949,50,1 --log-interval 1 --eval-interval 100
        --eval-iters 10 --save-interval 100 --weight-decay 0.1 --clip-grad 1.0 --hysteresis 2
        --num-workers 2 --distributed-backend nccl --fp16 --seed 1234 --load checkpoints
        --save checkpoints --no-async-tensor-model-parallel-allreduce --use-flash-attn
        --tensorboard-queue-size 1 --log-timers-to-tensorboard --log-batch-size-to-tensorboard
        --log-validation-ppl-to-tensorboard --tensorboard-dir tensorboard
        --log-optimizer-states-to-tensorboard
        --vocab-file tokenizer.model --tokenizer-type JapaneseSentencePiece
        --data-path data/ja_text_document --data-impl mmap
        --deepspeed --deepspeed_config ds_config.json --zero-stage 1
        --pipeline-model-parallel-size {pp} --wandb-name name
        """,
    )


def _v3(
    preset: str, sizes: str, parallel: str, batch: str, rates: str, decay: int, extra: str = ""
) -> Script:
    layers, hidden, ffn, heads = sizes.split()
    tensor, pipeline = parallel.split()
    micro, world = batch.split()
    lr, min_lr = rates.split()
    return Script(
        preset,
        f"""
        --tensor-model-parallel-size {tensor} --pipeline-model-parallel-size {pipeline}
        --context-parallel-size 1 --sequence-parallel --use-distributed-optimizer
        --num-layers {layers} --hidden-size {hidden} --ffn-hidden-size {ffn}
        --num-attention-heads {heads} --seq-length 4096 --max-position-embeddings 4096
        --micro-batch-size {micro} --global-batch-size {world} --train-iters {decay + 2000}
        --tokenizer-type Llama2Tokenizer --tokenizer-model tokenizer.model
        --load checkpoints --save checkpoints --data-path {BLEND} --split 1,0,0
        --data-cache-path cache --distributed-backend nccl --init-method-std 0.02
        --lr {lr} --min-lr {min_lr} --lr-decay-style cosine --lr-decay-iters {decay}
        --weight-decay 0.1 --clip-grad 1 --lr-warmup-iters 2000 --optimizer adam
        --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8 --log-interval 1
        --eval-interval {decay + 2000} --eval-iters 0 --bf16
        --untie-embeddings-and-output-weights --position-embedding-type rope
        --disable-bias-linear --use-mcore-models --normalization RMSNorm --norm-epsilon 1e-5
        --no-masked-softmax-fusion --attention-dropout 0.0 --hidden-dropout 0.0 --swiglu
        --use-flash-attn --recompute-activations --recompute-granularity selective
        --attention-softmax-in-fp32 --transformer-impl transformer_engine --use-mpi --use-z-loss
        --log-throughput --wandb-name name --wandb-project project --wandb-entity llm-jp {extra}
        """,
        () if preset == "llm-jp-3-172b" else ("NVTE_FUSED_ATTN=0",),
    )


def _v4(preset: str, layers: int, hidden: int, ffn: int, heads: int, tp: int, mbs: int, lr: int):
    return Script(
        preset,
        f"""
        --num-layers {layers} --hidden-size {hidden} --ffn-hidden-size {ffn}
        --num-attention-heads {heads} --group-query-attention --num-query-groups 8
        --seq-length 4096 --max-position-embeddings 4096 --position-embedding-type rope
        --rotary-base 500000 --untie-embeddings-and-output-weights --swiglu
        --normalization RMSNorm --norm-epsilon 1e-6 --disable-bias-linear
        --tokenizer-type Llama2Tokenizer --tokenizer-model tokenizer.model
        --optimizer adam --lr {lr}e-4 --min-lr {lr}e-5 --adam-beta1 0.9 --adam-beta2 0.95
        --adam-eps 1e-8 --clip-grad 1.0 --weight-decay 0.1 --init-method-std 0.02
        --attention-dropout 0.0 --hidden-dropout 0.0 --train-iters 12000000
        --lr-warmup-iters 2000 --lr-decay-iters 12000000 --lr-decay-style WSD
        --lr-wsd-decay-style linear --lr-wsd-decay-iters 1 --eval-interval 999999999
        --eval-iters 0 --micro-batch-size {mbs} --global-batch-size 512
        --tensor-model-parallel-size {tp} --pipeline-model-parallel-size 1
        --context-parallel-size 1 --sequence-parallel --use-distributed-optimizer
        --distributed-backend nccl --distributed-timeout-minutes 120 --use-mpi
        --data-path {BLEND} --data-cache-path cache --split 1,0,0 --bf16 --use-mcore-models
        --no-masked-softmax-fusion --use-flash-attn --overlap-grad-reduce --overlap-param-gather
        --attention-softmax-in-fp32 --transformer-impl transformer_engine
        --attention-backend fused
        --log-interval 1 --log-throughput --moe-per-layer-logging --wandb-entity llm-jp
        --wandb-project project --wandb-exp-name name
        --load base --save checkpoints --save-interval 1000 --async-save
        --ckpt-format torch_dist
        """,
        ("NVTE_FWD_LAYERNORM_SM_MARGIN=16", "NVTE_BWD_LAYERNORM_SM_MARGIN=16"),
    )


V4_EXPERTS = Script(
    "llm-jp-4-32b-a3b",
    f"""
    --num-layers 32 --hidden-size 2560 --moe-ffn-hidden-size 960 --ffn-hidden-size 960
    --num-attention-heads 40 --group-query-attention --num-query-groups 4 --kv-channels 128
    --seq-length 4096 --max-position-embeddings 4096 --position-embedding-type rope
    --rotary-base 500000 --untie-embeddings-and-output-weights --swiglu --normalization RMSNorm
    --norm-epsilon 1e-6 --disable-bias-linear --qk-layernorm
    --tokenizer-type Llama2Tokenizer --tokenizer-model tokenizer.model
    --optimizer adam --lr 4e-4 --min-lr 4e-5 --adam-beta1 0.9 --adam-beta2 0.95
    --adam-eps 1e-8 --clip-grad 1.0 --weight-decay 0.1 --init-method-std 0.006
    --attention-dropout 0.0 --hidden-dropout 0.0 --manual-gc --manual-gc-interval 10
    --moe-aux-loss-coeff 1e-2 --moe-grouped-gemm --moe-permute-fusion --moe-router-dtype fp32
    --moe-router-load-balancing-type aux_loss --moe-router-topk 8
    --moe-token-dispatcher-type alltoall --moe-z-loss-coeff 1e-3 --num-experts 128
    --train-iters 12000000 --lr-warmup-iters 2000 --lr-decay-iters 12000000
    --lr-decay-style WSD --lr-wsd-decay-style linear --lr-wsd-decay-iters 1
    --eval-interval 999999999 --eval-iters 0 --micro-batch-size 2 --global-batch-size 1024
    --context-parallel-size 1 --expert-model-parallel-size 4 --pipeline-model-parallel-size 1
    --sequence-parallel --tensor-model-parallel-size 1 --use-distributed-optimizer
    --distributed-backend nccl --distributed-timeout-minutes 120 --use-mpi
    --data-path {BLEND} --data-cache-path cache --split 1,0,0 --bf16 --use-mcore-models
    --no-masked-softmax-fusion --use-flash-attn --overlap-grad-reduce --overlap-param-gather
    --attention-softmax-in-fp32 --transformer-impl transformer_engine
    --attention-backend flash --accumulate-allreduce-grads-in-fp32
    --cross-entropy-fusion-impl native --cross-entropy-loss-fusion
    --log-interval 1 --log-throughput --moe-per-layer-logging --wandb-entity llm-jp
    --wandb-project project --wandb-exp-name name
    --load base --save checkpoints --save-interval 1000 --async-save
    --ckpt-format torch_dist
    """,
    ("PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",),
)


V4_EXPERTS_B200 = Script(
    "llm-jp-4-291b-a27b",
    f"""
    --num-layers 70 --hidden-size 5120 --ffn-hidden-size 2048 --num-attention-heads 80
    --group-query-attention --num-query-groups 8 --kv-channels 128
    --seq-length 4096 --max-position-embeddings 4096 --position-embedding-type rope
    --rotary-base 500000 --untie-embeddings-and-output-weights --swiglu --normalization RMSNorm
    --norm-epsilon 1e-6 --disable-bias-linear --qk-layernorm
    --num-experts 128 --moe-router-topk 8 --moe-ffn-hidden-size 2048
    --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2 --moe-z-loss-coeff 1e-3
    --moe-router-dtype fp32 --moe-token-dispatcher-type alltoall --moe-grouped-gemm
    --moe-permute-fusion --moe-router-fusion
    --tokenizer-type Llama2Tokenizer --tokenizer-model tokenizer.model
    --optimizer adam --lr 4e-4 --min-lr 4e-5 --adam-beta1 0.9 --adam-beta2 0.95
    --adam-eps 1e-8 --clip-grad 1.0 --weight-decay 0.1 --init-method-std 0.006
    --attention-dropout 0.0 --hidden-dropout 0.0
    --train-iters 12000000 --lr-warmup-iters 2000 --lr-decay-iters 12000000
    --lr-decay-style WSD --lr-wsd-decay-style linear --lr-wsd-decay-iters 1
    --eval-interval 999999999 --eval-iters 0 --micro-batch-size 2 --global-batch-size 2880
    --tensor-model-parallel-size 1 --pipeline-model-parallel-size 6
    --expert-model-parallel-size 8 --expert-tensor-parallel-size 1 --context-parallel-size 1
    --sequence-parallel --use-distributed-optimizer --distributed-backend nccl
    --distributed-timeout-minutes 120 --num-dataset-builder-threads 16
    --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split
    --num-virtual-stages-per-pipeline-rank 2 --overlap-grad-reduce --overlap-param-gather
    --recompute-granularity selective --recompute-modules moe --rerun-mode disabled
    --bf16 --use-mcore-models --transformer-impl transformer_engine --attention-backend flash
    --no-masked-softmax-fusion --attention-softmax-in-fp32 --accumulate-allreduce-grads-in-fp32
    --cross-entropy-fusion-impl native --cross-entropy-loss-fusion
    --manual-gc --manual-gc-interval 100 --async-save --ckpt-format torch_dist
    --use-persistent-ckpt-worker --log-interval 1 --log-throughput
    --log-timers-to-tensorboard --log-memory-to-tensorboard --log-world-size-to-tensorboard
    --moe-per-layer-logging --wandb-entity llm-jp --wandb-project project
    --wandb-exp-name name --tensorboard-dir tensorboard
    --load checkpoints --save checkpoints --save-interval 100
    --data-path {BLEND} --data-cache-path cache --split 1,0,0
    """,
    ("PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True", "NCCL_IB_QPS_PER_CONNECTION=8"),
)


V2 = Script(
    "llm-jp-13b-v2.0",
    f"""
    --tensor-model-parallel-size 2 --pipeline-model-parallel-size 4 --sequence-parallel
    --use-distributed-optimizer --num-layers 40 --hidden-size 5120 --ffn-hidden-size 13824
    --num-attention-heads 40 --seq-length 4096 --max-position-embeddings 4096
    --micro-batch-size 1 --global-batch-size 1024 --train-iters 61000
    --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model
    --use-checkpoint-args --load checkpoints --save checkpoints
    --train-data-path {BLEND} --valid-data-path {BLEND} --test-data-path {BLEND}
    --distributed-backend nccl --init-method-std 0.02 --lr 3e-4 --min-lr 3e-5
    --lr-decay-style cosine --weight-decay 0.1 --clip-grad 1 --lr-warmup-iters 2000
    --optimizer adam --adam-beta1 0.9 --adam-beta2 0.95 --log-interval 1 --save-interval 100
    --eval-interval 100 --eval-iters 10 --bf16 --untie-embeddings-and-output-weights
    --use-rotary-position-embeddings --normalization RMSNorm --norm-epsilon 1e-5
    --no-position-embedding --no-masked-softmax-fusion --no-query-key-layer-scaling
    --attention-dropout 0.0 --hidden-dropout 0.0 --disable-bias-linear --no-bias-gelu-fusion
    --group-query-attention --num-query-groups 40 --swiglu --use-flash-attn
    --recompute-activations --recompute-granularity selective --use-mpi
    --wandb-name name --wandb-project project --wandb-entity llm-jp
    """,
)

SCRIPTS = [
    _v1("llm-jp-1.3b-v1.0", 24, 2048, 16, "0.013", "2.0e-4", pp=1, mbs=4),
    _v1("llm-jp-13b-v1.0", 40, 5120, 40, "0.008", "1.0e-4", pp=8, mbs=1),
    V2,
    _v3("llm-jp-3-150m", "12 512 2048 8", "1 1", "8 512", "3e-4 3e-5", 986240),
    _v3("llm-jp-3-440m", "16 1024 3584 8", "1 1", "8 512", "3e-4 3e-5", 986240),
    _v3("llm-jp-3-980m", "20 1536 5376 8", "1 1", "4 512", "3e-4 3e-5", 986240),
    _v3("llm-jp-3-1.8b", "24 2048 7168 16", "1 1", "4 512", "3e-4 3e-5", 986240),
    _v3("llm-jp-3-3.7b", "28 3072 8192 24", "1 1", "2 1024", "3e-4 3e-5", 492120),
    _v3("llm-jp-3-7.2b", "32 4096 11008 32", "2 2", "4 1024", "2.5e-4 2.5e-5", 492120),
    _v3("llm-jp-3-13b", "40 5120 13824 40", "2 2", "2 1024", "2e-4 2e-5", 492120),
    _v3(
        "llm-jp-3-172b",
        "96 12288 38464 96",
        "4 16",
        "1 1728",
        "8e-5 8e-6",
        290812,
        "--group-query-attention --num-query-groups 16 --distributed-timeout-minutes 15",
    ),
    _v4("llm-jp-4-8b", 32, 4096, 14336, 32, tp=1, mbs=1, lr=3),
    V4_EXPERTS,
    V4_EXPERTS_B200,
    _v4("llm-jp-4-32b", 64, 5120, 27648, 40, tp=4, mbs=2, lr=2),
]
