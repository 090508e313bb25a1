"""Conversion from Hugging Face to native and back, compared with transformers' models."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
import transformers
from torch.distributed.checkpoint import FileSystemReader

from megatron_llmjp.convert.formats.hugging_face.architectures.registry import ARCHITECTURES
from tests.convert.hf_models import MODELS, llama, state
from tests.convert.megatron_parts import assert_parts_of
from tests.support.tolerances import LOGITS, assert_close
from tests.support.witness import assert_files_match_manifest

LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 50000.0, "factor": 16.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
TOKENS = torch.arange(2 * 24).view(2, 24) * 7 % 101


@pytest.mark.parametrize(
    ("architecture", "changes", "dtype"),
    [
        ("llama", {}, torch.float32),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 8}, torch.bfloat16),
        ("llama", {"num_hidden_layers": 101, "hidden_size": 16}, torch.float32),
        ("gpt2", {}, torch.float32),
        ("gpt2", {"activation_function": "gelu"}, torch.float16),
        ("gpt2", {"tie_word_embeddings": False}, torch.float32),
        ("gpt_neox", {}, torch.float32),
        ("llama", {"rope_parameters": LINEAR}, torch.float32),
        ("llama", {"rope_parameters": LLAMA3}, torch.float32),
        ("gpt_neox", {"use_parallel_residual": True}, torch.float32),
        ("qwen3", {}, torch.float32),
        ("qwen3", {"tie_word_embeddings": True}, torch.bfloat16),
        ("gpt_neox", {"hidden_act": "gelu_new", "tie_word_embeddings": True}, torch.bfloat16),
    ],
)
def test_round_trip_is_exact(tmp_path, convert, architecture, changes, dtype):
    model = MODELS[architecture](**changes)
    model.to(dtype).save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    convert(
        "--from",
        "hf",
        "--to",
        "native",
        "--input",
        tmp_path / "hf",
        "--output",
        tmp_path / "native",
        "--target-tensor-parallel-size",
        4,
    )
    assert_parts_of(model, tmp_path / "native" / "iter_0000000", 1, padded=512)
    convert(
        "--from",
        "native",
        "--to",
        "hf",
        "--input",
        tmp_path / "native",
        "--output",
        tmp_path / "back",
        "--max-shard-size",
        "50KB",
        "--workers",
        1,
    )
    before, after = state(tmp_path / "hf"), state(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(
        torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before
    )
    configs = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("hf", "back")]
    for key in ("rope_parameters", "use_parallel_residual"):
        assert configs[0].get(key) == configs[1].get(key)
    load = transformers.AutoModelForCausalLM.from_pretrained
    fp32 = load(tmp_path / "hf", dtype=torch.float32)
    again, info = load(tmp_path / "back", dtype=torch.float32, output_loading_info=True)
    assert type(again) is type(model)
    assert not any(info.values()), info  # missing, unexpected and mismatched keys
    with torch.no_grad():
        expected, found = (loaded.eval()(TOKENS).logits for loaded in (fp32, again))
    assert_close(found, expected, LOGITS, "logits")


def test_native_checkpoint_is_complete(tmp_path, convert):
    llama().save_pretrained(tmp_path / "hf")
    convert("--to", "native", "--input", tmp_path / "hf", "--output", tmp_path / "native")
    content = assert_files_match_manifest(tmp_path / "native" / "iter_0000000")
    assert (content["contents"], content["iteration"]) == ("weights", 0)
    assert (tmp_path / "native" / "latest_checkpointed_iteration.txt").read_text() == "0"


@pytest.mark.parametrize(("tensor", "rows"), [(1, 128), (4, 512)])
def test_vocabulary_is_padded_for_the_target(tmp_path, convert, tensor, rows):
    """To a multiple of 128 x tensor parallel size, as in Megatron-LM; the last row is repeated."""
    llama().save_pretrained(tmp_path / "hf")
    convert("--to", "native", "--input", tmp_path / "hf", "--output", tmp_path / "native",
            "--target-tensor-parallel-size", tensor)  # fmt: skip
    folder = tmp_path / "native" / "iter_0000000"
    assert f"padded_vocab_size: {rows}\n" in (folder / "config.yaml").read_text()
    read = FileSystemReader(folder).read_metadata().state_dict_metadata
    assert read["output_layer.weight"].size == (rows, 64)


def test_workers_and_shards_do_not_change_the_tensors(tmp_path, convert):
    llama().save_pretrained(tmp_path / "hf")
    convert("--to", "native", "--input", tmp_path / "hf", "--output", tmp_path / "native")
    for name, *more in (("one", "--workers", 1), ("two", "--workers", 3)):
        convert(
            "--to",
            "hf",
            "--input",
            tmp_path / "native",
            "--output",
            tmp_path / name,
            "--max-shard-size",
            "100KB",
            *more,
        )
    names = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "two").iterdir())
    assert len(names) > 4
    assert all(
        (tmp_path / "one" / n).read_bytes() == (tmp_path / "two" / n).read_bytes() for n in names
    )
    index = json.loads((tmp_path / "one" / "model.safetensors.index.json").read_text())
    found = state(tmp_path / "one")
    assert index["weight_map"].keys() == found.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())


def test_weight_files_are_filled_to_the_maximum_size(tmp_path, convert):
    """In order: no file exceeds it, and none could hold the next tensor too."""
    llama().save_pretrained(tmp_path / "hf")
    there = ("--input", tmp_path / "hf", "--output")
    convert("--to", "native", *there, tmp_path / "native")
    out = ("--to", "hf", "--input", tmp_path / "native", "--output")
    convert(*out, tmp_path / "one")
    (file,) = (tmp_path / "one").glob("*.safetensors")
    sizes = list(tensor_sizes(file).values())
    limit = sizes[0] + sizes[1]  # the first file is exactly full
    convert(*out, tmp_path / "many", "--max-shard-size", limit)
    files = [tensor_sizes(path) for path in sorted((tmp_path / "many").glob("*.safetensors"))]
    assert [size for file in files for size in file.values()] == sizes
    assert len(files[0]) == 2 and len(files) > 4
    assert all(sum(file.values()) <= limit or len(file) == 1 for file in files)
    for file, after in itertools.pairwise(files):
        assert sum(file.values()) + next(iter(after.values())) > limit

    megatron = ("--to", "megatron-lm", "--ckpt-format", "torch_dist")
    convert("--to", "native", *there, tmp_path / "a", "--max-shard-size", "100KB")
    convert(*megatron, *there, tmp_path / "b", "--max-shard-size", "100KB")
    for root in (tmp_path / "a", tmp_path / "b"):
        (folder,) = (path.parent for path in root.rglob(".metadata"))
        archives = {}  # by torch's reader
        for info in FileSystemReader(folder).read_metadata().storage_data.values():
            file = archives.setdefault(info.relative_path, {})
            file[info.offset] = info.length
        ends = {name: sum(archives[name].values()) for name in archives}
        assert len(ends) > 4
        # An archive of a tensor has up to 2 KB more than the tensor, which are not counted.
        assert all(end <= 102_000 or len(archives[name]) == 1 for name, end in ends.items())
        ordered = sorted(archives, key=lambda name: int(name.split("_")[3].split(".")[0]))
        for name, after in itertools.pairwise(ordered[:-1]):
            assert ends[name] + archives[after][0] > 100_000


def tensor_sizes(path) -> dict[str, int]:
    """Return the size of each tensor of a safetensors file, in its order."""
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    header.pop("__metadata__", None)
    places = {name: entry["data_offsets"] for name, entry in header.items()}
    return {name: b - a for name, (a, b) in sorted(places.items(), key=lambda item: item[1])}


MINIMAL = {
    # keys of config.json that are required here
    "llama": ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    "gpt2": ("n_embd", "n_layer", "n_head", "n_positions"),
    "qwen3": ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    "gpt_neox": ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
}


OTHER = {
    # config.json with other values than the defaults, and the resulting fields
    "llama": (
        {"num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 8, "head_dim": 12,
         "num_key_value_heads": 2, "intermediate_size": 99, "max_position_embeddings": 77,
         "rms_norm_eps": 3e-4, "rope_theta": 777.0, "vocab_size": 101, "attention_bias": False,
         "tie_word_embeddings": True, "initializer_range": 0.3, "attention_dropout": 0.2},
        {"num_layers": 3, "hidden_size": 64, "num_attention_heads": 8, "kv_channels": 12,
         "attention_dropout": 0.2,
         "num_query_groups": 2, "ffn_hidden_size": 99, "max_position_embeddings": 77,
         "norm_epsilon": 3e-4, "rotary_base": 777, "vocab_size": 101,
         "untie_embeddings_and_output_weights": False, "init_method_std": 0.3,
         "activation_function": "swiglu", "normalization": "RMSNorm"},
    ),
    "gpt2": (
        {"n_layer": 3, "n_embd": 64, "n_head": 8, "n_inner": 99, "n_positions": 77,
         "layer_norm_epsilon": 3e-4, "resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.2,
         "vocab_size": 101, "activation_function": "gelu", "initializer_range": 0.3},
        {"num_layers": 3, "hidden_size": 64, "num_attention_heads": 8, "ffn_hidden_size": 99,
         "max_position_embeddings": 77, "norm_epsilon": 3e-4, "hidden_dropout": 0.3,
         "attention_dropout": 0.2, "vocab_size": 101, "activation_function": "gelu",
         "init_method_std": 0.3, "untie_embeddings_and_output_weights": False,
         "position_embedding_type": "learned_absolute", "normalization": "LayerNorm"},
    ),
    "gpt_neox": (
        {"num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 8,
         "intermediate_size": 99, "max_position_embeddings": 77, "layer_norm_eps": 3e-4,
         "rotary_emb_base": 777, "rotary_pct": 0.5, "use_parallel_residual": False,
         "hidden_dropout": 0.3, "attention_dropout": 0.2, "hidden_act": "gelu_new",
         "vocab_size": 101, "tie_word_embeddings": False, "initializer_range": 0.3},
        {"num_layers": 3, "hidden_size": 64, "num_attention_heads": 8, "ffn_hidden_size": 99,
         "max_position_embeddings": 77, "norm_epsilon": 3e-4, "rotary_base": 777,
         "rotary_percent": 0.5, "use_parallel_residual": False, "hidden_dropout": 0.3,
         "attention_dropout": 0.2, "activation_function": "gelu_tanh", "vocab_size": 101,
         "untie_embeddings_and_output_weights": True, "init_method_std": 0.3,
         "kv_channels": 8, "num_query_groups": 8, "normalization": "LayerNorm"},
    ),
    "qwen3": (
        {"num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 8, "head_dim": 12,
         "num_key_value_heads": 2, "intermediate_size": 99, "max_position_embeddings": 77,
         "rms_norm_eps": 3e-4, "rope_theta": 777.0, "vocab_size": 101, "attention_bias": False,
         "tie_word_embeddings": True, "initializer_range": 0.3, "attention_dropout": 0.2},
        {"num_layers": 3, "hidden_size": 64, "num_attention_heads": 8, "kv_channels": 12,
         "attention_dropout": 0.2, "qk_layernorm": True, "add_bias_linear": False,
         "num_query_groups": 2, "ffn_hidden_size": 99, "max_position_embeddings": 77,
         "norm_epsilon": 3e-4, "rotary_base": 777, "vocab_size": 101,
         "untie_embeddings_and_output_weights": False, "init_method_std": 0.3,
         "activation_function": "swiglu", "normalization": "RMSNorm"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("architecture", OTHER)
def test_every_key_of_config_json_is_read_and_written(architecture):
    config, expected = OTHER[architecture]
    model = ARCHITECTURES[architecture].from_config(config, Path("config.json"))
    fields = model.model_dump()
    assert {name: fields[name] for name in expected} == expected
    written = ARCHITECTURES[architecture].to_config(model)
    assert config.keys() - written.keys() <= {"vocab_size", "tie_word_embeddings"}  # by others
    assert {key: written[key] for key in config if key in written}.items() <= config.items()


@pytest.mark.parametrize("architecture", MINIMAL)
def test_keys_missing_from_config_json_have_the_defaults_of_transformers(architecture):
    """For example rms_norm_eps: it is 1e-6 in LLaMA's class, and 1e-5 in most models."""
    values = dict.fromkeys(MINIMAL[architecture], 4) | {"vocab_size": 101, "hidden_size": 64}
    if architecture == "gpt2":
        values["n_embd"] = values.pop("hidden_size")
    defaults = transformers.CONFIG_MAPPING[architecture](**values).to_dict()
    read = ARCHITECTURES[architecture].from_config
    found, expected = (read(config, Path("config.json")) for config in (values, defaults))
    assert found == expected
    names = {
        "llama": "rms_norm_eps",
        "qwen3": "rms_norm_eps",
        "gpt2": "layer_norm_epsilon",
        "gpt_neox": "layer_norm_eps",
    }
    assert found.norm_epsilon == defaults[names[architecture]]


def test_config_has_the_keys_of_old_and_new_transformers(tmp_path, convert):
    llama().to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    convert("--to", "native", "--input", tmp_path / "hf", "--output", tmp_path / "native")
    convert("--to", "hf", "--input", tmp_path / "native", "--output", tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5000.0
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert config["vocab_size"] == 101
    assert config["head_dim"] == 12


def test_vocabulary_padding_can_be_kept(tmp_path, convert):
    llama().save_pretrained(tmp_path / "hf")
    convert("--to", "native", "--input", tmp_path / "hf", "--output", tmp_path / "native")
    convert(
        "--to",
        "hf",
        "--input",
        tmp_path / "native",
        "--output",
        tmp_path / "padded",
        "--keep-vocab-padding",
        "--dtype",
        "fp16",
    )
    tensors = state(tmp_path / "padded")
    assert tensors["lm_head.weight"].shape == (128, 64)
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    assert torch.equal(tensors["lm_head.weight"][127], tensors["lm_head.weight"][100])


def test_tokenizer_files_are_copied_unchanged(tmp_path, convert):
    import tokenizers

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3, "x": 4}
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    model = tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")
    tokenizers.Tokenizer(model).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{ "bos_token": "<s>", "eos_token": {"content": "</s>"},  "pad_token": "<pad>"}'
    )
    llama(bos_token_id=None, eos_token_id=None).save_pretrained(tmp_path / "hf")
    convert(
        "--to",
        "native",
        "--input",
        tmp_path / "hf",
        "--output",
        tmp_path / "native",
        "--tokenizer",
        folder,
    )
    convert("--to", "hf", "--input", tmp_path / "native", "--output", tmp_path / "back")
    for path in folder.iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    for name in ("config.json", "generation_config.json"):
        found = json.loads((tmp_path / "back" / name).read_text())
        assert {k: found[k] for k in ids} == ids
