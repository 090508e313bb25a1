"""Closed form of Megatron's checkpoints: each rank's tensors, cut from transformers' models.

The files are read with ``torch.load`` and torch's reader of distributed checkpoints. Nothing here
shares code with the converter: heads and ranks are cut one by one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers

from tests.support.witness import read_weights

FUSED = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
OLD = {
    "self_attention.query_key_value.": "self_attention.linear_qkv.",
    "self_attention.dense.": "self_attention.linear_proj.",
    "post_attention_layernorm.": "pre_mlp_layernorm.",
    "mlp.dense_h_to_4h.": "mlp.linear_fc1.",
    "mlp.dense_4h_to_h.": "mlp.linear_fc2.",
}
"""Names in other programs' files -> names of megatron-core without Transformer Engine."""

Parts = dict[tuple[str, int], torch.Tensor]
"""Tensors by name of megatron-core, with global layer numbers, and tensor-parallel rank."""


def assert_parts_of(
    model: transformers.PreTrainedModel, folder: Path, size: int, padded: int
) -> None:
    """Compare a Megatron folder with a model, bit for bit.

    Args:
        model: of transformers, in the types of the files.
        folder: with the rank folders, layer files or torch_dist files.
        size: of tensor parallelism in the files.
        padded: vocabulary size including padding.
    """
    found, swiglu = read_parts(folder), model.config.model_type in LLAMA_KIN
    expected = {
        (name, rank): part
        for name, whole in whole_tensors(model, padded)
        for rank, part in enumerate(rank_parts(name, whole, size, swiglu))
    }
    assert found.keys() == expected.keys()
    for key, part in expected.items():
        assert found[key].dtype == part.dtype and torch.equal(found[key], part), key


def whole_tensors(
    model: transformers.PreTrainedModel, padded: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield all tensors of a model, named and laid out as by megatron-core on one rank."""
    state, kind = {k: v.detach() for k, v in model.state_dict().items()}, model.config.model_type
    llama_names = ("model.embed_tokens", "model.norm", "lm_head")
    words, norm, head = {
        **dict.fromkeys(LLAMA_KIN, llama_names),
        "gpt2": ("transformer.wte", "transformer.ln_f", "lm_head"),
        "gpt_neox": ("gpt_neox.embed_in", "gpt_neox.final_layer_norm", "embed_out"),
    }[kind]
    head = head if f"{head}.weight" in state else "lm_head"  # of GPT-NeoX in transformers 5
    rows = [min(row, model.config.vocab_size - 1) for row in range(padded)]
    yield "embedding.word_embeddings.weight", state[f"{words}.weight"][rows]
    if kind == "gpt2":
        yield "embedding.position_embeddings.weight", state["transformer.wpe.weight"]
    for number in range(model.config.num_hidden_layers):
        for name, tensor in LAYERS[kind](state, number, model.config):
            yield f"decoder.layers.{number}.{name}", tensor
    for name in ("weight", "bias"):
        if f"{norm}.{name}" in state:
            yield f"decoder.final_layernorm.{name}", state[f"{norm}.{name}"]
    if not model.config.tie_word_embeddings:
        yield "output_layer.weight", state[f"{head}.weight"][rows]


def _llama(state, number, config) -> Iterator[tuple[str, torch.Tensor]]:
    layer = f"model.layers.{number}"
    d, groups = config.head_dim, config.num_key_value_heads
    width = config.num_attention_heads // groups * d
    for kind in ("weight", "bias") if getattr(config, "mlp_bias", False) else ("weight",):
        q, k, v = (state[f"{layer}.self_attn.{x}_proj.{kind}"] for x in "qkv")
        rows = [
            piece[group * n : (group + 1) * n]
            for group in range(groups)
            for piece, n in ((q, width), (k, d), (v, d))
        ]
        yield f"self_attention.linear_qkv.{kind}", torch.cat(rows)
        yield f"self_attention.linear_proj.{kind}", state[f"{layer}.self_attn.o_proj.{kind}"]
        gate, up = (state[f"{layer}.mlp.{x}_proj.{kind}"] for x in ("gate", "up"))
        yield f"mlp.linear_fc1.{kind}", torch.cat([gate, up])
        yield f"mlp.linear_fc2.{kind}", state[f"{layer}.mlp.down_proj.{kind}"]
    yield "input_layernorm.weight", state[f"{layer}.input_layernorm.weight"]
    yield "pre_mlp_layernorm.weight", state[f"{layer}.post_attention_layernorm.weight"]


def _qwen3(state, number, config) -> Iterator[tuple[str, torch.Tensor]]:
    yield from _llama(state, number, config)
    for x in "qk":
        norm = state[f"model.layers.{number}.self_attn.{x}_norm.weight"]
        yield f"self_attention.{x}_layernorm.weight", norm


def _gpt2(state, number, config) -> Iterator[tuple[str, torch.Tensor]]:
    layer, h = f"transformer.h.{number}", config.n_embd
    d = h // config.n_head
    columns = [
        column
        for head in range(config.n_head)
        for part in range(3)
        for column in range(part * h + head * d, part * h + (head + 1) * d)
    ]
    for kind in ("weight", "bias"):
        yield f"self_attention.linear_qkv.{kind}", state[f"{layer}.attn.c_attn.{kind}"].t()[columns]
        yield f"self_attention.linear_proj.{kind}", state[f"{layer}.attn.c_proj.{kind}"].t()
        yield f"mlp.linear_fc1.{kind}", state[f"{layer}.mlp.c_fc.{kind}"].t()
        yield f"mlp.linear_fc2.{kind}", state[f"{layer}.mlp.c_proj.{kind}"].t()
        yield f"input_layernorm.{kind}", state[f"{layer}.ln_1.{kind}"]
        yield f"pre_mlp_layernorm.{kind}", state[f"{layer}.ln_2.{kind}"]


def _gpt_neox(state, number, config) -> Iterator[tuple[str, torch.Tensor]]:
    layer = f"gpt_neox.layers.{number}"
    for kind in ("weight", "bias"):
        for theirs, ours in (
            ("attention.query_key_value", "self_attention.linear_qkv"),
            ("attention.dense", "self_attention.linear_proj"),
            ("mlp.dense_h_to_4h", "mlp.linear_fc1"),
            ("mlp.dense_4h_to_h", "mlp.linear_fc2"),
            ("input_layernorm", "input_layernorm"),
            ("post_attention_layernorm", "pre_mlp_layernorm"),
        ):
            yield f"{ours}.{kind}", state[f"{layer}.{theirs}.{kind}"]


LAYERS = {"llama": _llama, "gpt2": _gpt2, "gpt_neox": _gpt_neox, "qwen3": _qwen3}
LLAMA_KIN = ("llama", "qwen3")


def rank_parts(name: str, whole: torch.Tensor, size: int, swiglu: bool) -> list[torch.Tensor]:
    """Return the part of each tensor-parallel rank."""
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        n = whole.shape[1] // size
        return [whole[:, rank * n : (rank + 1) * n] for rank in range(size)]
    n = whole.shape[0] // size
    if ".linear_fc1." in name and swiglu:
        half = n // 2
        starts = [(rank * half, whole.shape[0] // 2 + rank * half) for rank in range(size)]
        return [torch.cat([whole[start : start + half] for start in pair]) for pair in starts]
    if name.endswith(("word_embeddings.weight", "output_layer.weight")) or any(
        module in name for module in (".linear_qkv.", ".linear_fc1.")
    ):
        return [whole[rank * n : (rank + 1) * n] for rank in range(size)]
    return [whole] * size


def read_parts(folder: Path) -> Parts:
    """Return the tensors in a checkpoint of Megatron-LM or Megatron-DeepSpeed."""
    if (folder / ".metadata").exists():
        return {(renamed(name, FUSED), 0): t for name, t in read_weights(folder).items()}
    if list(folder.glob("layer_*")):
        return _layer_files(folder)
    if list(folder.glob("mp_rank_*_model_states.pt")):
        return _module_files(folder)
    return _rank_folders(folder)


def renamed(name: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        name = name.replace(old, new)
    return name


def _rank_folders(folder: Path) -> Parts:
    """Read ``mp_rank_TT_PPP/model_optim_rng.pt`` of Megatron-LM."""
    found: Parts = {}
    stages = {path.name[11:] for path in folder.glob("mp_rank_*")}
    for path in sorted(folder.glob("mp_rank_*/model_optim_rng.pt")):
        rank, stage = int(path.parent.name[8:10]), int(path.parent.name[11:] or 0)
        content = torch.load(path, weights_only=False)
        layers = content["args"].num_layers // len(stages)
        for name, tensor in content["model"].items():
            if not torch.is_tensor(tensor):
                continue
            if name.startswith("decoder.layers."):
                number, inner = name.removeprefix("decoder.layers.").split(".", 1)
                name = f"decoder.layers.{int(number) + stage * layers}.{inner}"
            found[renamed(name, FUSED), rank] = tensor
    words = {rank: t for (name, rank), t in found.items() if "word_embeddings" in name}
    for rank, tensor in words.items():
        if not content["args"].untie_embeddings_and_output_weights and len(stages) > 1:
            assert torch.equal(found.pop(("output_layer.weight", rank)), tensor)
    return found


def _layer_files(folder: Path) -> Parts:
    """Read ``layer_NN-model_TT-model_states.pt`` of Megatron-DeepSpeed's pipeline."""
    found: Parts = {}
    args = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)["args"]
    for path in folder.glob("layer_*"):
        match = re.fullmatch(r"layer_(\d\d)-model_(\d\d)-model_states\.pt", path.name)
        assert match is not None
        number, rank = int(match[1]), int(match[2])
        for key, tensor in torch.load(path).items():
            if number == 1:
                name = f"embedding.{key}"
            elif number < args.num_layers + 2:
                name = f"decoder.layers.{number - 2}.{renamed(key, OLD)}"
            elif number == args.num_layers + 2:
                name = f"decoder.final_layernorm.{key}"
            else:
                name = key.replace("lm_head", "output_layer")
            found[name, rank] = tensor
    return found


def _module_files(folder: Path) -> Parts:
    """Read ``mp_rank_TT_model_states.pt`` of Megatron-DeepSpeed without pipeline."""
    found: Parts = {}
    for path in folder.glob("mp_rank_*"):
        module = torch.load(path, weights_only=False)["module"]["language_model"]
        rank = int(path.name[8:10])
        for name, content in module["embedding"].items():
            found[f"embedding.{name}.weight", rank] = content["weight"]
        for key, tensor in module["encoder"].items():
            found[f"decoder.{renamed(key, OLD)}", rank] = tensor
        if "output_layer" in module:
            found["output_layer.weight", rank] = module["output_layer"]["weight"]
    return found
