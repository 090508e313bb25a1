#!/usr/bin/env bash
# A launch script for Megatron-DeepSpeed as those of LLM-jp's v1.0 are written; its sizes fit a laptop.
set -eu

MODEL_SIZE=laptop
GLOBAL_BATCH_SIZE=8
BATCH_SIZE=2
ZERO_STAGE=1
HOSTFILE=${HOSTFILE:-hostfile}
NUM_NODES=${NUM_NODES:-1}
MP_SIZE=${MP_SIZE:-1}
PP_SIZE=${PP_SIZE:-1}
SEQ_LEN=64

# schedule, in tokens
TRAIN_TOKENS=$((20 * GLOBAL_BATCH_SIZE * SEQ_LEN))
WARMUP_TOKENS=$((4 * GLOBAL_BATCH_SIZE * SEQ_LEN))
TRAIN_SAMPLES=$((TRAIN_TOKENS / SEQ_LEN))

TOKENIZER_MODEL=${TOKENIZER_MODEL:-tokenizer/tokenizer.model}
DATA_PATH=${DATA_PATH:-2 data/ja_text_document 1 data/en_text_document}
CHECKPOINT_DIR=${CHECKPOINT_DIR:-checkpoints}

template_json="ds_config_gpt_TEMPLATE.json"
config_json="ds_config_${MODEL_SIZE}_zero${ZERO_STAGE}.json"
sed "s/CONFIG_BATCH_SIZE/${GLOBAL_BATCH_SIZE}/; s/CONFIG_MBSIZE/${BATCH_SIZE}/;
    s/ZERO_STAGE/${ZERO_STAGE}/" ${template_json} >${config_json}

megatron_options="
    --override-opt_param-scheduler
    --adam-beta1 0.9 --adam-beta2 0.95
    --tensor-model-parallel-size ${MP_SIZE} --pipeline-model-parallel-size ${PP_SIZE}
    --init-method-std 0.02
    --lr-decay-tokens ${TRAIN_TOKENS} --lr-warmup-tokens ${WARMUP_TOKENS}
    --train-tokens ${TRAIN_TOKENS} --train-samples ${TRAIN_SAMPLES}
    --micro-batch-size ${BATCH_SIZE} --global-batch-size ${GLOBAL_BATCH_SIZE}
    --exit-duration-in-mins 30000000
    --num-layers 4 --hidden-size 64 --num-attention-heads 4
    --seq-length ${SEQ_LEN} --max-position-embeddings ${SEQ_LEN}
    --hidden-dropout 0.0 --attention-dropout 0.0
    --lr 2.0e-3 --min-lr 1.0e-6 --lr-decay-style cosine --weight-decay 0.1 --clip-grad 1.0
    --split 100,0,0 --seed 1234 --num-workers 0
    --log-interval 1 --eval-interval 100 --eval-iters 0 --save-interval 10
    --distributed-backend nccl --no-async-tensor-model-parallel-allreduce --use-flash-attn
    --log-timers-to-tensorboard --log-batch-size-to-tensorboard
    --log-optimizer-states-to-tensorboard --tensorboard-queue-size 1
    --load ${CHECKPOINT_DIR} --save ${CHECKPOINT_DIR}
"
data_options="
    --vocab-file ${TOKENIZER_MODEL} --tokenizer-type JapaneseSentencePiece
    --data-path ${DATA_PATH} --data-impl mmap
"
deepspeed_options="
    --deepspeed --deepspeed_config ${config_json} --zero-stage ${ZERO_STAGE}
"

deepspeed --hostfile ${HOSTFILE} --num_nodes ${NUM_NODES} \
    pretrain_gpt.py ${megatron_options} ${data_options} ${deepspeed_options}
