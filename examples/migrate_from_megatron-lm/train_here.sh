#!/usr/bin/env bash
# train.sh, brought over. The only changes: no mpirun, and a CPU instead of a GPU.
set -eu

# parallelism
TENSOR_PARALLEL_SIZE=${TENSOR_PARALLEL_SIZE:-1}
PIPELINE_PARALLEL_SIZE=${PIPELINE_PARALLEL_SIZE:-1}

# schedule
TRAIN_STEPS=20
LR_WARMUP_STEPS=4

# data: weight and prefix
TOKENIZER_ARGS=${TOKENIZER_ARGS:---tokenizer-type Llama2Tokenizer --tokenizer-model tokenizer/tokenizer.model}
if [[ -z "${TRAIN_DATA_PATH:-}" ]]; then
    TRAIN_DATA_PATH=""
    TRAIN_DATA_PATH="${TRAIN_DATA_PATH} 2 data/ja_text_document"
    TRAIN_DATA_PATH="${TRAIN_DATA_PATH} 1 data/en_text_document"
fi

CHECKPOINT_DIR=${CHECKPOINT_DIR:-checkpoints}

GPT_ARGS="
    --tensor-model-parallel-size ${TENSOR_PARALLEL_SIZE}
    --pipeline-model-parallel-size ${PIPELINE_PARALLEL_SIZE}
    --use-distributed-optimizer
    --num-layers 4 --hidden-size 64 --ffn-hidden-size 176
    --num-attention-heads 4 --group-query-attention --num-query-groups 2
    --seq-length 64 --max-position-embeddings 64
    --position-embedding-type rope --normalization RMSNorm --norm-epsilon 1e-5 --swiglu
    --disable-bias-linear --untie-embeddings-and-output-weights
    --attention-dropout 0.0 --hidden-dropout 0.0 --init-method-std 0.02
    --micro-batch-size 2 --global-batch-size 8 --train-iters ${TRAIN_STEPS}
    --optimizer adam --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8
    --lr 2e-3 --min-lr 2e-4 --lr-decay-style cosine --lr-decay-iters ${TRAIN_STEPS}
    --lr-warmup-iters ${LR_WARMUP_STEPS} --weight-decay 0.1 --clip-grad 1.0 --seed 1234
    --data-path ${TRAIN_DATA_PATH} --split 100,0,0 --num-workers 0
    ${TOKENIZER_ARGS}
    --use-mcore-models --transformer-impl ${TRANSFORMER_IMPL:-local} --use-flash-attn
    --attention-softmax-in-fp32 --no-masked-softmax-fusion
    --recompute-activations --recompute-granularity selective
    --distributed-backend nccl --use-mpi --eval-interval ${TRAIN_STEPS} --eval-iters 0
    --log-interval 1 --log-throughput --save-interval 10
    --load ${CHECKPOINT_DIR} --save ${CHECKPOINT_DIR}
    ${DEVICE_ARGS:---device cpu --nproc-per-node 1}
"

pretrain_gpt ${GPT_ARGS} "$@"
