"""Fields and flags of mixture-of-experts models."""

from __future__ import annotations

import pytest
import yaml
from pydantic import ValidationError

from megatron_llmjp.config.expert_config import ModelConfig, parse_layer_pattern
from megatron_llmjp.config.flags import parse
from megatron_llmjp.config.loading import dump_config, replace_fields
from megatron_llmjp.config.parameter_counts import count_parameters
from megatron_llmjp.config.schema import Config, ParallelConfig
from megatron_llmjp.config.validation import check_config
from megatron_llmjp.errors import UserError
from megatron_llmjp.estimate.flops import flops_by_part

BASE = "--config llm-jp-3-1.8b --train-iters 9 --num-experts 8"

INVALID = {
    # flags over llm-jp-3-1.8b (24 layers) with 8 experts on 8 processes: part of the message
    "--num-experts 1 --moe-router-topk 4": "moe_router_topk requires experts: set num_moe_experts",
    "--num-experts 1 --expert-model-parallel-size 2": "expert_model_parallel_size requires experts",
    "--moe-layer-freq [0,1]*5": "moe_layer_freq has 10 entries, but num_layers is 24",
    "--moe-layer-freq [0]*24": "moe_layer_freq has no layer with experts",
    "--moe-shared-expert-gate": "requires moe_shared_expert_intermediate_size",
    "--moe-router-topk 9": "moe_router_topk 9 exceeds num_moe_experts 8",
    "--moe-router-topk 1": "moe_router_topk 1 requires moe_router_pre_softmax",
    "--moe-router-enable-expert-bias": "requires moe_router_score_function sigmoid",
    "--moe-router-pre-softmax --moe-router-score-function sigmoid": "requires moe_router_score_fun",
    "--moe-aux-loss-coeff 0.1 --moe-router-load-balancing-type none": "has no effect with moe_rout",
    "--moe-router-load-balancing-type sinkhorn --moe-router-pre-softmax": "no effect with moe_rout",
    "--moe-router-num-groups 2": "moe_router_group_topk must be set together",
    "--moe-router-num-groups 3 --moe-router-group-topk 1": "8 is not divisible by moe_router_num_",
    "--moe-router-num-groups 8 --moe-router-group-topk 1": "exceeds the experts of 1 groups of 1",
    "--moe-pad-expert-input-to-capacity": "requires moe_expert_capacity_factor",
    "--moe-expert-capacity-factor 1 --moe-router-load-balancing-type sinkhorn": "not supported",
    "--moe-expert-capacity-factor 1 --moe-pad-expert-input-to-capacity": "type alltoall",
    "--expert-model-parallel-size 3": "num_moe_experts 8 is not divisible by expert_model_",
    "--expert-model-parallel-size 8 --pipeline-model-parallel-size 2": "x pipeline_model_parallel_"
    "size 2 = 16: the ranks of a pipeline stage",
    "--tensor-model-parallel-size 2 --expert-tensor-parallel-size 1": "does not sum the experts'",
    "--tensor-model-parallel-size 2 --no-sequence-parallel": "require sequence_parallel",
    "--expert-tensor-parallel-size 2 --moe-ffn-hidden-size 255": "255 is not divisible by expert_",
    "--tensor-model-parallel-size 2 --moe-shared-expert-intermediate-size 255": "255 is not divis",
    "--use-parallel-residual": "use_parallel_residual with num_moe_experts is not implemented",
    "--add-bias-linear": "add_bias_linear with num_moe_experts is not implemented",
}


@pytest.mark.parametrize("flags", INVALID)
def test_a_rule_is_violated(flags):
    with pytest.raises(UserError) as found:
        check_config(parse([*BASE.split(), *flags.split()]).config, 8)
    assert INVALID[flags] in str(found.value)


VALID = (
    "--moe-layer-freq 2 --moe-shared-expert-intermediate-size 64 --moe-shared-expert-gate",
    "--moe-router-load-balancing-type sinkhorn",
    "--moe-router-topk 1 --moe-router-pre-softmax --moe-aux-loss-coeff 0.01",
    "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-num-groups 4 "
    "--moe-router-group-topk 2 --moe-router-load-balancing-type none",
    "--moe-expert-capacity-factor 1.5 --moe-pad-expert-input-to-capacity "
    "--moe-token-dispatcher-type alltoall --expert-model-parallel-size 8",
    "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2 "
    "--expert-model-parallel-size 4 --expert-tensor-parallel-size 1",
)


@pytest.mark.parametrize("flags", VALID)
def test_valid(flags):
    check_config(parse([*BASE.split(), *flags.split()]).config, 8)


def test_layers_with_experts():
    """Numbers and lists of Megatron-LM, from a flag, from YAML, and written and read again."""
    assert parse_layer_pattern("([0]*1+[1]*3)*2") == (0, 1, 1, 1, 0, 1, 1, 1)
    for wrong in ("[2", "[0]*x", "print([1])", "[0]**2", "[[0]]", "[0]*10**9", "3", "[1.0]"):
        with pytest.raises(ValueError, match="list of 0 and 1"):
            parse_layer_pattern(wrong)
    sizes = {"num_layers": 4, "hidden_size": 8, "num_attention_heads": 2}
    dense = ModelConfig(**sizes, moe_layer_freq="[1]*4")
    assert not dense.has_experts and not any(dense.expert_layers)
    every = {value: ModelConfig(**sizes, num_moe_experts=2, moe_layer_freq=value).expert_layers
             for value in (1, "2", "3", "[0]*2+[1,1]", (0, 1, 0, 0))}  # fmt: skip
    assert [sum(2**i for i, layer in enumerate(x) if layer) for x in every.values()] == [
        15, 5, 9, 12, 2,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="moe_layer_freq"):
        ModelConfig(**sizes, num_moe_experts=2, moe_layer_freq="[2]*4")
    config = Config(model=ModelConfig(**sizes, num_moe_experts=2, moe_layer_freq="[0,1]*2"))
    assert Config.model_validate(yaml.safe_load(dump_config(config))) == config


def test_flags_without_field():
    """Flags of experts have no effect on a dense model; with experts most are refused."""
    given = ["--moe-shared-expert-overlap", "--topk", "2", "--moe-input-jitter-eps", "0.1"]
    command = parse(["--config", "llm-jp-3-1.8b", "--train-iters", "9", *given])
    assert command.notes == tuple(
        f"{flag} is not needed here: a dense model has no experts"
        for flag in given
        if flag.startswith("--")
    )
    with pytest.raises(UserError) as found:
        parse([*BASE.split(), *given])
    assert str(found.value).splitlines() == [
        "--topk is not supported: use --moe-router-topk",
        "--moe-input-jitter-eps is not supported: this part of a mixture-of-experts model is not "
        "implemented",
    ]
    (note,) = parse([*BASE.split(), "--moe-shared-expert-overlap"]).notes
    assert note == "--moe-shared-expert-overlap is not offered: the result is the same without it"
    command = parse([*BASE.split(), "--moe-token-dispatcher-type", "flex", "--moe-enable-deepep"])
    assert command.config.parallel.moe_token_dispatcher_type == "alltoall"
    assert "--moe-token-dispatcher-type flex: alltoall is used" in "\n".join(command.notes)
    with pytest.raises(ValidationError, match="requires DeepEP or HybridEP"):
        ParallelConfig(moe_token_dispatcher_type="flex")


def test_published_sizes():
    """Mixtral 8x7B and Qwen3-30B-A3B: parameters in total and per token, as published."""
    mixtral = ModelConfig(
        num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32,
        num_query_groups=8, num_moe_experts=8, vocab_size=32000,
    )  # fmt: skip
    qwen = ModelConfig(
        num_layers=48, hidden_size=2048, moe_ffn_hidden_size=768, num_attention_heads=32,
        num_query_groups=4, kv_channels=128, num_moe_experts=128, moe_router_topk=8,
        qk_layernorm=True, vocab_size=151936,
    )  # fmt: skip
    counts = [count_parameters(Config(model=model)) for model in (mixtral, qwen)]
    assert [count.total for count in counts] == [46_702_792_704, 30_532_122_624]
    assert [round(count.active / 1e9, 1) for count in counts] == [12.9, 3.4]
    # The experts of a token are as many FLOPs as a dense layer of their size together.
    config = Config(model=qwen)
    dense = replace_fields(config, num_moe_experts=None, ffn_hidden_size=8 * 768)
    assert flops_by_part(config) == flops_by_part(dense)
