"""Mixture-of-experts models against transformers' Mixtral and Qwen3-MoE: logits, training losses.

The load balancing losses differ in two ways, both taken into account here. transformers counts the
choices of experts per token, megatron-core their share: transformers' loss is top k times larger.
transformers multiplies means over all layers; megatron-core multiplies those of each layer, and
adds the losses of the layers. They are equal, but for that factor, in a model with one layer of
experts (Qwen3-MoE below). For Mixtral with two layers, transformers' function is applied to each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from tests.support.processes import run_ranks
from tests.support.tolerances import LOGITS, TRAINED, assert_close

STEPS = 50
VOCABULARY = 100
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
         "vocab_size": VOCABULARY, "max_position_embeddings": 64,
         "tie_word_embeddings": False}  # fmt: skip
OURS = {
    "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "vocab_size": VOCABULARY,
    "make_vocab_size_divisible_by": 4, "max_position_embeddings": 64, "num_layers": 2,
}  # fmt: skip
COEFFICIENT = 0.02
"""Of megatron-core's loss."""

MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {
        **OURS, "ffn_hidden_size": 48, "num_moe_experts": 4, "moe_router_topk": 2,
        "norm_epsilon": 1e-5, "moe_aux_loss_coeff": COEFFICIENT,
    },
    "qwen3-moe": {
        **OURS, "ffn_hidden_size": 64, "moe_ffn_hidden_size": 24, "num_moe_experts": 6,
        "moe_router_topk": 3, "moe_layer_freq": "[0]+[1]", "kv_channels": 16,
        "norm_epsilon": 1e-6, "qk_layernorm": True, "moe_aux_loss_coeff": COEFFICIENT,
    },
}  # fmt: skip


def mixtral() -> transformers.PreTrainedModel:
    config = transformers.MixtralConfig(
        **SIZES, num_hidden_layers=2, intermediate_size=48, num_local_experts=4,
        num_experts_per_tok=2, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def qwen3_moe() -> transformers.PreTrainedModel:
    config = transformers.Qwen3MoeConfig(
        **SIZES, num_hidden_layers=2, intermediate_size=64, moe_intermediate_size=24, head_dim=16,
        num_experts=6, num_experts_per_tok=3, norm_topk_prob=True, mlp_only_layers=[0],
        rms_norm_eps=1e-6, router_aux_loss_coef=COEFFICIENT / 3, output_router_logits=True,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config)


def translate(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return transformers' weights under megatron-core's names, of four heads in two groups."""
    found = {
        "embedding.word_embeddings.weight": theirs["model.embed_tokens.weight"],
        "output_layer.weight": theirs["lm_head.weight"],
        "decoder.final_layernorm.weight": theirs["model.norm.weight"],
    }
    for i in range(2):
        layer = {
            key.removeprefix(f"model.layers.{i}."): value
            for key, value in theirs.items()
            if key.startswith(f"model.layers.{i}.")
        }
        q, k, v = (layer[f"self_attn.{x}_proj.weight"] for x in "qkv")
        groups = zip(q.chunk(2), k.chunk(2), v.chunk(2), strict=True)
        ours = {
            "self_attention.linear_qkv.weight": torch.cat([part for g in groups for part in g]),
            "self_attention.linear_proj.weight": layer["self_attn.o_proj.weight"],
            "input_layernorm.weight": layer["input_layernorm.weight"],
            "pre_mlp_layernorm.weight": layer["post_attention_layernorm.weight"],
        }
        if "self_attn.q_norm.weight" in layer:
            ours["self_attention.q_layernorm.weight"] = layer["self_attn.q_norm.weight"]
            ours["self_attention.k_layernorm.weight"] = layer["self_attn.k_norm.weight"]
        if "mlp.gate.weight" in layer:
            ours["mlp.router.weight"] = layer["mlp.gate.weight"]
            for n, weight in enumerate(layer["mlp.experts.gate_up_proj"]):
                ours[f"mlp.experts.local_experts.{n}.linear_fc1.weight"] = weight
            for n, weight in enumerate(layer["mlp.experts.down_proj"]):
                ours[f"mlp.experts.local_experts.{n}.linear_fc2.weight"] = weight
        else:
            gate, up = layer["mlp.gate_proj.weight"], layer["mlp.up_proj.weight"]
            ours["mlp.linear_fc1.weight"] = torch.cat([gate, up])
            ours["mlp.linear_fc2.weight"] = layer["mlp.down_proj.weight"]
        found |= {f"decoder.layers.{i}.{name}": value for name, value in ours.items()}
    return {name: value.clone() for name, value in found.items()}


def train_theirs(name: str, model: Any, batches: torch.Tensor) -> tuple[list[float], list[float]]:
    """Train by torch's AdamW; return the cross entropies and megatron-core's balancing losses."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0
    )
    losses, balancing = [], []
    for tokens in batches:
        optimizer.zero_grad()
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        found = model(inputs, output_router_logits=True)
        loss = F.cross_entropy(found.logits.flatten(0, 1), labels.flatten())
        if name == "mixtral":
            per_layer = [load_balancing_loss_func((x,), 4, 2) for x in found.router_logits]
            total = sum(per_layer) / 2  # top k
            (loss + COEFFICIENT * total).backward()
            balancing.append(total.item() / 2)  # layers
        else:
            (loss + model.config.router_aux_loss_coef * found.aux_loss).backward()
            balancing.append(found.aux_loss.item() / 3)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, balancing


def compute(root: str, models: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Compute logits, and train, with megatron-core's model and optimizer."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    from megatron_llmjp.config.schema import Config
    from megatron_llmjp.model.gpt import build_model
    from megatron_llmjp.parallel import process_groups
    from megatron_llmjp.parallel.device import setup
    from megatron_llmjp.parallel.ranks import single_process
    from megatron_llmjp.training import optimizer as optimizers
    from megatron_llmjp.training.expert_monitor import ExpertMonitor
    from megatron_llmjp.training.train_step import configure_schedules, train_step

    folder, device, found = Path(root), setup(), {}
    for number, (name, model) in enumerate(models.items()):
        config = Config.model_validate({
            "model": model,
            "data": {"seq_length": 32},
            "training": {"micro_batch_size": 2, "global_batch_size": 2},
            "optimizer": {"lr": 1e-3, "adam_eps": 1e-5, "weight_decay": 0.0},
        })  # fmt: skip
        if number == 0:
            process_groups.initialize(config, single_process(), device)
        chunks = build_model(config, device)
        chunks[0].load_state_dict(torch.load(folder / f"{name}.pt"), strict=False)
        batches = torch.load(folder / "batches.pt")
        positions = torch.arange(32).expand(2, 32)
        with torch.no_grad():
            logits = chunks[0].eval()(batches[0][:, :-1], positions, None)
        torch.save(logits, folder / f"{name}-logits.pt")
        chunks = optimizers.wrap_for_data_parallel([chunk.train() for chunk in chunks], config)
        optimizer = optimizers.build_optimizer(chunks, config)
        constant = {"init_lr": 1e-3, "max_lr": 1e-3, "min_lr": 1e-3, "lr_warmup_steps": 0,
                    "lr_decay_steps": 10**6, "lr_decay_style": "constant", "start_wd": 0.0,
                    "end_wd": 0.0, "wd_incr_steps": 1, "wd_incr_style": "constant"}  # fmt: skip
        scheduler = OptimizerParamScheduler(optimizer, **constant)
        configure_schedules(chunks, optimizer, config)
        monitor = ExpertMonitor(chunks, config)
        losses, balancing = [], []
        for tokens in batches:
            batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "position_ids": positions,
                     "loss_mask": torch.ones(2, 32)}  # fmt: skip
            result = train_step(chunks, optimizer, scheduler, [iter([batch])], config, 2)
            losses.append(float(result.sums[0, 0] / result.sums[0, 1]))
            balancing.append(monitor.take().load_balancing_loss)
        found[name] = [losses, balancing]
    return found


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Logits and losses of transformers, and of one process of megatron-core."""
    folder, theirs = tmp_path_factory.mktemp("experts"), {}
    batches = torch.randint(0, VOCABULARY, (STEPS, 2, 33), generator=torch.manual_seed(3))
    torch.save(batches, folder / "batches.pt")
    for name, make in {"mixtral": mixtral, "qwen3-moe": qwen3_moe}.items():
        torch.manual_seed(5)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
            logits = model.eval()(batches[0][:, :-1]).logits
        torch.save(translate(model.state_dict()), folder / f"{name}.pt")
        theirs[name] = logits, *train_theirs(name, model.train(), batches)
    (found,) = run_ranks(compute, 1, str(folder), MODELS)
    return folder, theirs, found


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(result, name):
    folder, theirs, _ = result
    ours = torch.load(folder / f"{name}-logits.pt")
    assert_close(ours, theirs[name][0], LOGITS, name)


@pytest.mark.parametrize("name", MODELS)
def test_training_losses_equal_transformers(result, name):
    _, theirs, found = result
    _, losses, balancing = theirs[name]
    assert balancing[-1] > 1.001  # balancing the load has an effect
    assert_close(found[name][0], losses, TRAINED, f"{name}: lm loss")
    assert_close(found[name][1], balancing, TRAINED, f"{name}: load balancing loss")


def test_fused_kernels_of_transformer_engine(monkeypatch):
    """They are used if requested, with its layers, and if its version has them."""
    from megatron.core.transformer.moe import moe_utils

    from megatron_llmjp.config.schema import Config
    from megatron_llmjp.model import experts
    from megatron_llmjp.model.kernels import KernelChoice

    fused = {"moe_permute_fusion": True, "moe_router_fusion": True}
    sections = {"model": MODELS["qwen3-moe"], "parallel": fused}
    requested = Config.model_validate(sections)

    def choice(config, layers):
        kernels = KernelChoice(transformer_engine=layers, fusions=False, apex=False)
        settings = experts.expert_settings(config, kernels)
        return settings["moe_permute_fusion"], settings["moe_router_fusion"]

    assert choice(requested, True) == (False, False)  # not installed here
    for name in experts._PERMUTATION:
        monkeypatch.setattr(moe_utils, name, print, raising=False)
    assert choice(requested, True) == (True, False)
    for name in experts._ROUTER:
        monkeypatch.setattr(moe_utils, name, None, raising=False)  # an older version
    assert choice(requested, True) == (True, False)
    for name in experts._ROUTER:
        monkeypatch.setattr(moe_utils, name, print, raising=False)
    assert choice(requested, True) == (True, True)
    assert choice(requested, False) == (False, False)
    dense_kernels = Config.model_validate({"model": MODELS["qwen3-moe"]})
    assert choice(dense_kernels, True) == (False, False)
