"""Bugs of other converters that no other test covers (table in docs/convert.md)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.convert.hf_models import gpt2, llama, state


@pytest.fixture
def there(tmp_path, convert):
    """Return a function that converts a LLaMA to a format and returns the folder of its files."""

    def make(target: str, *flags: object) -> Path:
        llama(rope_theta=10000.0).save_pretrained(tmp_path / "hf")
        convert("--to", target, "--input", tmp_path / "hf", "--output", tmp_path / target, *flags)
        return next(path for path in (tmp_path / target).iterdir() if path.is_dir())

    return make


def refused(convert, folder: Path) -> str:
    """Run a conversion that fails; return the message."""
    out = folder.parent.parent / "out"
    text = convert("--to", "hf", "--input", folder, "--output", out, code=2)
    assert not out.exists()
    return text


def edit(path: Path, change) -> None:
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


REFUSED = {
    "rotary_interleaved": True, "mtp_num_layers": 1,
    "multi_latent_attention": True, "squared_relu": True, "apply_layernorm_1p": True,
    "window_size": (128, 0), "attention_output_gate": True, "softmax_type": "off-by-one",
}  # fmt: skip


def test_arguments_that_change_the_network_are_refused(there, convert):
    """Converters ignored rotary interleaving and the biases of SwiGLU."""
    path = there("megatron-lm", "--ckpt-format", "torch") / "mp_rank_00" / "model_optim_rng.pt"
    folder = path.parent.parent
    for name, value in {**REFUSED, "add_bias_linear": True}.items():
        args = torch.load(path, weights_only=False)["args"]
        before = getattr(args, name, None)
        edit(path, lambda content, n=name, v=value: setattr(content["args"], n, v))
        missing = "missing: decoder.layers.0.mlp.linear_fc1.bias"
        assert (missing if name == "add_bias_linear" else name) in refused(convert, folder)
        edit(path, lambda content, n=name, v=before: setattr(content["args"], n, v))
    convert("inspect", folder)
    edit(path, lambda content: setattr(content["args"], "my_new_attention", True))
    assert "--ignore-args my_new_attention" in convert("inspect", folder, code=2)
    convert("inspect", folder, "--ignore-args", "my_new_attention")


def test_quantized_weights_are_refused(tmp_path, convert):
    """fp8 weights have the names and shapes of unquantized weights."""
    llama().save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    for method in ("fp8", "gptq", "bitsandbytes"):
        path.write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
        text = refused(convert, path.parent)
        assert f"config.json: quantization_config (quant_method '{method}')" in text


def test_an_unknown_order_of_qkv_rows_is_refused(there, convert):
    """Without ``checkpoint_version`` rows have the order of 2020."""
    legacy = there("megatron-lm", "--ckpt-format", "torch")
    edit(legacy / "mp_rank_00" / "model_optim_rng.pt", lambda c: c.pop("checkpoint_version"))
    assert "checkpoint_version 0 has a different order" in refused(convert, legacy)
    deepspeed = there("megatron-deepspeed")
    edit(deepspeed / "mp_rank_00_model_states.pt", lambda c: c.pop("checkpoint_version"))
    assert "checkpoint_version 0 has a different order" in refused(convert, deepspeed)


def test_unsupported_embeddings_are_refused(there, convert):
    """BLOOM has a norm after the embedding; old sequence parallelism split the positions."""
    path = there("megatron-deepspeed") / "layer_01-model_00-model_states.pt"
    for key, message in (
        ("word_embeddings.norm.weight", "unexpected: decoder.layers.0.word_embeddings.norm.weight"),
        ("position_embeddings.local_embeddings.weight", "split by sequence parallelism"),
    ):
        edit(path, lambda layer, key=key: layer.update({key: torch.ones(64)}))
        assert message in refused(convert, path.parent)
        edit(path, lambda layer, key=key: layer.pop(key))


def test_a_missing_output_layer_is_an_error(tmp_path, convert):
    """transformers initializes a missing output layer randomly; an index lists a missing tensor."""
    llama().save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    index = tmp_path / "hf" / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    shard = tmp_path / "hf" / places["lm_head.weight"]
    tensors = {}
    with safe_open(shard, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys() if key != "lm_head.weight"}  # noqa: SIM118
    save_file(tensors, shard)
    words = ("--to", "native", "--input", tmp_path / "hf", "--output", tmp_path / "o")
    assert "missing: lm_head.weight" in convert(*words, code=2)
    del places["lm_head.weight"]
    index.write_text(json.dumps({"weight_map": places}))
    assert "missing: lm_head.weight" in convert(*words, code=2)
    assert not (tmp_path / "o").exists()


def test_files_are_like_those_of_transformers(tmp_path, convert):
    """Converters kept GPT-2's eos, omitted the header's format, and wrote a tied layer twice."""
    gpt2().save_pretrained(tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == 50256
    convert("--to", "hf", "--input", tmp_path / "hf", "--output", tmp_path / "back")
    for name in ("config.json", "generation_config.json"):
        text = (tmp_path / "back" / name).read_text()
        assert "50256" not in text
    with safe_open(tmp_path / "back" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert state(tmp_path / "back").keys() == state(tmp_path / "hf").keys()
