"""Conversion from Hugging Face to native and back, compared with transformers' models."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

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
    fp32 = [
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        for name in ("hf", "back")
    ]
    assert type(fp32[1]) is type(model)
    with torch.no_grad():
        expected, found = (loaded.eval()(TOKENS).logits for loaded in fp32)
    assert_close(found, expected, LOGITS, "logits")


def test_native_checkpoint_is_complete(tmp_path, convert):
    llama().save_pretrained(tmp_path / "hf")
    convert("--to", "native", "--input", tmp_path / "hf", "--output", tmp_path / "native")
    content = assert_files_match_manifest(tmp_path / "native" / "iter_0000000")
    assert (content["contents"], content["iteration"]) == ("weights", 0)
    assert (tmp_path / "native" / "latest_checkpointed_iteration.txt").read_text() == "0"


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
