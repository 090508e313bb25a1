"""Conversion of models with experts, compared with transformers and megatron-core."""

from __future__ import annotations

import json
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import transformers

from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.formats.hugging_face.architectures.registry import ARCHITECTURES
from megatron_llmjp.convert.formats.megatron_lm.arguments import model_from_args
from megatron_llmjp.convert.verification.reference_routing import Routing, route
from megatron_llmjp.errors import UserError
from tests.convert.hf_models import COMMON, noisy, state
from tests.convert.test_megatron_fields import arguments
from tests.convert.test_verify import figures
from tests.support.tolerances import LOGITS, assert_within
from tests.support.witness import read_tensors

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 12, "max_position_embeddings": 64,
    "rms_norm_eps": 3e-5, "rope_theta": 5000.0, "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS = 4


def mixtral(**changes) -> transformers.PreTrainedModel:
    fields = {**COMMON, **SIZES, "num_local_experts": EXPERTS, "num_experts_per_tok": 2, **changes}
    return noisy(transformers.MixtralForCausalLM(transformers.MixtralConfig(**fields)))


def qwen3_moe(**changes) -> transformers.PreTrainedModel:
    fields = {
        **COMMON, **SIZES, "num_experts": EXPERTS, "num_experts_per_tok": 3,
        "moe_intermediate_size": 40, "norm_topk_prob": True, **changes,
    }  # fmt: skip
    return noisy(transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**fields)))


MODELS = {
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    # a dense layer between layers with experts, and scores that are not normalized
    "mixed": lambda: qwen3_moe(mlp_only_layers=[1], norm_topk_prob=False),
}
TORCH = ("--ckpt-format", "torch")
TARGETS = {
    "native": (),
    "megatron-lm": (),
    "megatron-lm local": ("--transformer-impl", "local"),
    "megatron-lm tp2pp3": (*TORCH, "--target-tensor-parallel-size", 2,
                           "--target-pipeline-parallel-size", 3),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Folders of the Hugging Face models."""
    root = tmp_path_factory.mktemp("models")
    for name, make in MODELS.items():
        make().save_pretrained(root / name)
    return root


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_exact_and_the_logits_are_equal(tmp_path, models, convert, name, target):
    """Of transformers and of megatron-core (native), or of the reference model (Megatron-LM)."""
    text = convert("--to", target.split()[0], *TARGETS[target], "--input", models / name,
                   "--output", tmp_path / "there", "--verify")  # fmt: skip
    assert_within(figures(text)[0], LOGITS, "logits")
    convert("--to", "hf", "--input", tmp_path / "there", "--output", tmp_path / "back")
    before, after = state(models / name), state(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    configs = [
        json.loads((f / "config.json").read_text()) for f in (models / name, tmp_path / "back")
    ]
    same = configs[0].keys() & configs[1].keys() - {"bos_token_id", "eos_token_id"}
    ignored = {"router_aux_loss_coef"} if "torch" in target else set()
    assert {k for k in same if configs[0][k] != configs[1][k]} <= ignored
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert loaded.config.num_experts_per_tok == configs[0]["num_experts_per_tok"]


def test_layouts_are_those_of_megatron_core(tmp_path, models, convert):
    """Keys and shapes of ``sharded_state_dict``; layers are stacked, or numbered if they differ."""
    for name in MODELS:
        words = ("--input", models / name, "--output")
        convert("--to", "native", *words, tmp_path / name / "native")
        convert("--to", "megatron-lm", "--transformer-impl", "local", *words,
                tmp_path / name / "megatron")  # fmt: skip
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        expected = pool.submit(core_shapes, tmp_path).result()
    for name in MODELS:
        for kind in ("native", "megatron"):
            (folder,) = (path.parent for path in (tmp_path / name / kind).rglob(".metadata"))
            found = {key: tuple(t.shape) for key, t in read_tensors(folder).items()}
            assert found == expected[f"{name} {kind}"]


def core_shapes(folder: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return key and global shape of every tensor of megatron-core's models."""
    import dataclasses

    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs

    from megatron_llmjp.config.loading import load_config
    from megatron_llmjp.model import gpt
    from megatron_llmjp.parallel import device, process_groups
    from megatron_llmjp.parallel.ranks import single_process

    def shapes(model) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for value in model.sharded_state_dict().values():
            parts = value.build() if isinstance(value, ShardedTensorFactory) else [value]
            parts = parts.values() if isinstance(parts, dict) else parts
            found |= {p.key: tuple(p.global_shape) for p in parts if isinstance(p, ShardedTensor)}
        return found

    cpu = device.setup()
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name in MODELS:
        config = load_config(next((folder / name / "native").glob("iter_*")) / "config.yaml")
        if not found:
            process_groups.initialize(config, single_process(), cpu)
        found[f"{name} native"] = shapes(gpt.build_model_chunk(config, cpu))
        core = gpt.transformer_config(config, cpu)
        if all(config.model.expert_layers):  # as Megatron-LM passes its --moe-layer-freq
            core = dataclasses.replace(core, moe_layer_freq=1)
        spec = gpt_layer_specs.get_gpt_decoder_block_spec(core, use_transformer_engine=False)
        model = GPTModel(core, spec, 128, 64, position_embedding_type="rope",
                         share_embeddings_and_output_weights=False)  # fmt: skip
        found[f"{name} megatron"] = shapes(model)
    process_groups.destroy()
    return found


def test_each_expert_is_in_its_place(tmp_path, models, convert):
    """Cut from transformers' model: ``[layers, experts, 2 x ffn, h]``, gate rows first."""
    convert("--to", "megatron-lm", "--input", models / "mixtral", "--output", tmp_path / "dist")
    convert("--to", "megatron-lm", *TORCH, "--target-tensor-parallel-size", 2,
            "--input", models / "mixtral", "--output", tmp_path / "torch")  # fmt: skip
    tensors, hf = read_tensors(tmp_path / "dist" / "release"), state(models / "mixtral")
    ranks = [
        torch.load(tmp_path / f"torch/release/mp_rank_0{t}/model_optim_rng.pt", weights_only=False)
        for t in range(2)
    ]
    for layer in range(3):
        block = f"model.layers.{layer}.block_sparse_moe"
        router = tensors["decoder.layers.mlp.router.weight"][layer]
        assert torch.equal(router, hf[f"{block}.gate.weight"])
        for e in range(EXPERTS):
            gate, down, up = (hf[f"{block}.experts.{e}.w{n}.weight"] for n in (1, 2, 3))
            key = "decoder.layers.mlp.experts.experts.linear_fc"
            assert torch.equal(tensors[f"{key}1.weight"][layer, e], torch.cat([gate, up]))
            assert torch.equal(tensors[f"{key}2.weight"][layer, e], down)
            for t, content in enumerate(ranks):
                half = slice(48 * t, 48 * t + 48)
                own = f"decoder.layers.{layer}.mlp.experts.local_experts.{e}.linear_fc"
                found = content["model"][f"{own}1.weight"]
                assert torch.equal(found, torch.cat([gate[half], up[half]]))
                assert torch.equal(content["model"][f"{own}2.weight"], down[:, half])
    assert ranks[0]["args"].num_experts == EXPERTS and ranks[0]["args"].moe_layer_freq == 1


def test_grouped_experts_of_transformer_engine_are_read(tmp_path, models, convert):
    """``TEGroupedMLP`` has parameters ``linear_fc1.weight0``, ``weight1``, ..."""
    convert("--to", "megatron-lm", *TORCH, "--input", models / "mixed", "--output", tmp_path / "a")
    path = tmp_path / "a" / "release" / "mp_rank_00" / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    content["model"] = {
        re.sub(r"local_experts\.(\d+)\.(linear_fc\d)\.weight", r"\2.weight\1", key): value
        for key, value in content["model"].items()
    }
    assert "decoder.layers.2.mlp.experts.linear_fc2.weight3" in content["model"]
    torch.save(content, path)
    text = convert("--to", "hf", "--input", tmp_path / "a", "--output", tmp_path / "b", "--verify")
    assert_within(figures(text)[0], LOGITS, "logits")
    before, after = state(models / "mixed"), state(tmp_path / "b")
    assert all(torch.equal(before[key], after[key]) for key in before)
    for name, value in (("expert_model_parallel_size", 2), ("expert_tensor_parallel_size", 2)):
        setattr(content["args"], name, value)
        torch.save(content, path)
        text = convert("inspect", tmp_path / "a", code=2)
        assert f"{name} 2" in text and "--ckpt-format torch_dist" in text
        setattr(content["args"], name, 1)


def test_optimizer_state_and_megatron_deepspeed_are_refused(tmp_path, models, convert):
    words = ("--input", models / "mixtral", "--output", tmp_path / "x")
    assert "experts (num_moe_experts)" in convert("--to", "megatron-deepspeed", *words, code=2)
    convert("--to", "megatron-lm", *words)
    words = ("--input", tmp_path / "x", "--output", tmp_path / "y", "--with-optimizer")
    assert "models with experts is not converted" in convert("--to", "native", *words, code=2)


MOE = {"num_experts": 8, "moe_router_topk": 3, "moe_ffn_hidden_size": 40}
CHANGES_THE_NETWORK = {
    "num_experts": 4, "moe_router_topk": 4, "moe_ffn_hidden_size": 24, "moe_layer_freq": [1, 0],
    "moe_shared_expert_intermediate_size": 16, "moe_router_score_function": "sigmoid",
    "moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 2.0,
    "moe_router_num_groups": 4, "moe_router_enable_expert_bias": True,
    "moe_expert_capacity_factor": 1.0, "moe_latent_size": 16, "moe_apply_probs_on_input": True,
    "moe_router_force_load_balancing": True, "moe_router_topk_limited_devices": 2,
    "moe_new_option": 3, "add_bias_linear": True, "use_legacy_models": True,
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), CHANGES_THE_NETWORK.items())
def test_an_argument_of_experts_is_understood_or_refused(name, value):
    plain = model_from_args(arguments(**MOE), "x.pt")
    try:
        changed = model_from_args(arguments(**{**MOE, name: value}), "x.pt")
    except UserError as error:
        assert name in str(error) or "legacy model" in str(error)
    else:
        assert changed != plain


def test_arguments_of_experts_without_effect():
    plain = model_from_args(arguments(**MOE), "x.pt")
    same = {
        "moe_grouped_gemm": True, "moe_token_dispatcher_type": "flex", "moe_permute_fusion": True,
        "moe_layer_freq": [1, 1], "moe_router_force_load_balancing": False,
        "moe_latent_size": None,
    }  # fmt: skip
    assert model_from_args(arguments(**MOE, **same), "x.pt") == plain
    dense = model_from_args(arguments(), "x.pt")
    unused = {"moe_latent_size": 16, "moe_router_topk": 7, "moe_new_option": 3}
    for number in (None, 0, 1, [1]):
        assert model_from_args(arguments(num_experts=number, **unused), "x.pt") == dense
    losses = {"moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
              "moe_aux_loss_coeff": [0.1, 0.2]}  # fmt: skip
    several = model_from_args(arguments(**MOE, **losses), "x.pt")
    assert several.moe_router_load_balancing_type == "none" and several.moe_aux_loss_coeff == 0


REFUSED = [
    ("mixtral", {"sliding_window": 16}, "sliding_window"),
    ("mixtral", {"shared_expert_intermediate_size": 16}, "shared_expert_intermediate_size = 16"),
    ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window"),
    ("qwen3_moe", {"attention_bias": True}, "attention_bias"),
    ("qwen3_moe", {"num_local_experts": 9, "num_experts": 8}, "num_experts 8 and num_local_exp"),
    ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]}, "without a layer that has experts"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_keys_of_config_json_are_refused_by_name(models, name, changes, message):
    config = json.loads((models / name / "config.json").read_text())
    with pytest.raises(UserError, match=message):
        ARCHITECTURES[name].from_config({**config, **changes}, "config.json")


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_keys_missing_from_config_json_have_the_defaults_of_transformers(name):
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    values = dict.fromkeys(keys, 8) | {"vocab_size": 101}
    defaults = transformers.CONFIG_MAPPING[name](**values).to_dict()
    read = ARCHITECTURES[name].from_config
    assert read(values, "config.json") == read(defaults, "config.json")
    sparse = {**defaults, "decoder_sparse_step": 2} if name == "qwen3_moe" else defaults
    expected = (False, True) * 4 if name == "qwen3_moe" else (True,) * 8
    assert read(sparse, "config.json").expert_layers == expected


UNSUPPORTED = {
    "moe_shared_expert_intermediate_size": 16, "moe_router_score_function": "sigmoid",
    "moe_router_topk_scaling_factor": 2.0, "moe_router_num_groups": 2,
    "moe_router_enable_expert_bias": True, "moe_expert_capacity_factor": 1.0,
    "moe_router_load_balancing_type": "sinkhorn", "num_moe_experts": None,
    "add_bias_linear": True,
}  # fmt: skip


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_models_that_an_architecture_cannot_represent(models, name):
    config = json.loads((models / name / "config.json").read_text())
    model = ARCHITECTURES[name].from_config(config, "config.json")
    assert ARCHITECTURES[name].refusals(model) == []
    own = {"moe_layer_freq": (1, 0, 1), "moe_router_pre_softmax": True} if name == "mixtral" else {}
    for field, value in {**UNSUPPORTED, **own}.items():
        changed = model.model_copy(update={field: value})
        assert len(ARCHITECTURES[name].refusals(changed)) == 1, field
        assert all(ARCHITECTURES[other].refusals(model) for other in ("llama", "qwen3", "gpt2"))


def test_the_reference_router_with_a_bias():
    """Closed form: the bias changes the choice, not the weights."""
    logits, bias = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([9.0, 0.0, 0.0])
    found = route(logits, bias, Routing(2, True, False, 2.0))
    scores = logits.sigmoid()[0]
    expected = torch.tensor([scores[0], 0.0, scores[2]]) / (scores[0] + scores[2]) * 2
    assert torch.allclose(found[0], expected)


def test_tensors_of_shared_experts():
    from megatron_llmjp.convert.tensors import tensor_shapes

    model = ModelConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, num_moe_experts=2,
        moe_ffn_hidden_size=3, moe_shared_expert_intermediate_size=5, moe_shared_expert_gate=True,
        moe_router_enable_expert_bias=True,
    )  # fmt: skip
    found = tensor_shapes(model, 16)
    prefix = "decoder.layers.0.mlp."
    assert {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)} == {
        "router.weight": (2, 8), "router.expert_bias": (2,),
        "experts.local_experts.0.linear_fc1.weight": (6, 8),
        "experts.local_experts.0.linear_fc2.weight": (8, 3),
        "experts.local_experts.1.linear_fc1.weight": (6, 8),
        "experts.local_experts.1.linear_fc2.weight": (8, 3),
        "shared_experts.linear_fc1.weight": (10, 8), "shared_experts.linear_fc2.weight": (8, 5),
        "shared_experts.gate_weight": (1, 8),
    }  # fmt: skip
