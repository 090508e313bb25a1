"""Exports in the form of another model (``--like``), compared with save_pretrained's files."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers

from tests.convert.hf_models import MODELS, llama, noisy
from tests.convert.test_model_tokenizer import VOCABULARY, train
from tests.support.tokenizer_files import byte_level_bpe

LIMIT = "60KB"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def contents(folder, patterns=("*",)) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for pattern in patterns for p in folder.glob(pattern)}


def other_weights(architecture, **changes) -> transformers.PreTrainedModel:
    """Return a model with the weights of no reference."""
    return noisy(noisy(MODELS[architecture](**changes)))


def save_tokenizer(folder) -> None:
    """Save a fast tokenizer with a chat template and other settings of its own."""
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(("<unk>", "<s>", "</s>")),
        bos_token="<s>", eos_token="</s>", chat_template="{{ messages }}", model_max_length=77,
    )  # fmt: skip
    fast.save_pretrained(folder)


@pytest.mark.parametrize(
    ("architecture", "changes", "dtype"),
    [
        ("llama", {}, torch.float32),
        ("llama", {"tie_word_embeddings": True}, torch.bfloat16),
        ("gpt2", {}, torch.float16),
        ("gpt_neox", {"num_hidden_layers": 11}, torch.float32),
    ],
)
@pytest.mark.parametrize("limit", [LIMIT, "5GB"])
def test_weights_and_index_are_those_of_save_pretrained(
    tmp_path, convert, architecture, changes, dtype, limit
):
    MODELS[architecture](**changes).to(dtype).save_pretrained(tmp_path / "hf")
    convert("--to", "native", "--input", tmp_path / "hf", "--output", tmp_path / "native")
    convert("--to", "hf", "--input", tmp_path / "native", "--output", tmp_path / "out",
            "--max-shard-size", limit)  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "again", max_shard_size=limit)
    expected = contents(tmp_path / "again", WEIGHTS)
    assert (len(expected) > 3) == (limit == LIMIT)
    assert contents(tmp_path / "out", WEIGHTS) == expected


@pytest.mark.parametrize("architecture", MODELS)
def test_an_export_equals_what_save_pretrained_writes_for_the_reference(
    tmp_path, convert, architecture
):
    """Another type, sharding and generation settings than those of the source."""
    reference = MODELS[architecture](vocab_size=VOCABULARY).to(torch.bfloat16)
    reference.generation_config = transformers.GenerationConfig(
        eos_token_id=[2, 7], do_sample=True, top_k=13, temperature=0.5
    )
    save_tokenizer(tmp_path / "ref")
    reference.save_pretrained(tmp_path / "ref", max_shard_size=LIMIT)
    source = other_weights(architecture, vocab_size=VOCABULARY)
    source.save_pretrained(tmp_path / "source")
    convert("--to", "native", "--input", tmp_path / "source", "--output", tmp_path / "native")
    convert("--to", "hf", "--input", tmp_path / "native", "--output", tmp_path / "out",
            "--like", tmp_path / "ref")  # fmt: skip
    reference.load_state_dict(source.state_dict())
    save_tokenizer(tmp_path / "expected")
    reference.save_pretrained(tmp_path / "expected", max_shard_size=LIMIT)
    found, expected = contents(tmp_path / "out"), contents(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


def test_flags_take_precedence_and_one_file_gives_the_configuration_only(tmp_path, convert):
    llama().to(torch.bfloat16).save_pretrained(tmp_path / "ref", max_shard_size=LIMIT)
    config = json.loads((tmp_path / "ref" / "config.json").read_text())
    config["_name_or_path"] = "someone/else"
    (tmp_path / "ref" / "config.json").write_text(json.dumps(config))
    other_weights("llama").save_pretrained(tmp_path / "source")
    convert("--to", "hf", "--input", tmp_path / "source", "--output", tmp_path / "out",
            "--like", tmp_path / "ref", "--dtype", "fp16", "--max-shard-size", "5GB")  # fmt: skip
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["_name_or_path"]
    assert written == {**config, "dtype": "float16"}
    assert [p.name for p in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float16
    convert("--to", "hf", "--input", tmp_path / "source", "--output", tmp_path / "plain",
            "--like", tmp_path / "ref" / "config.json")  # fmt: skip
    assert json.loads((tmp_path / "plain" / "config.json").read_text()) == config
    assert {p.name for p in (tmp_path / "plain").iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors")
    }


def test_the_vocabulary_has_the_rows_of_the_reference(tmp_path, convert):
    """101 tokens in 128 rows of the native checkpoint; published models keep some padding."""
    source = other_weights("llama")
    source.save_pretrained(tmp_path / "source")
    convert("--to", "native", "--input", tmp_path / "source", "--output", tmp_path / "native")
    before = source.get_input_embeddings().weight
    for rows in (112, 101, 160):
        llama(vocab_size=rows).save_pretrained(tmp_path / f"ref{rows}")
        convert("--to", "hf", "--input", tmp_path / "native", "--output", tmp_path / f"{rows}",
                "--like", tmp_path / f"ref{rows}")  # fmt: skip
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"{rows}")
        weight = model.get_input_embeddings().weight
        assert weight.shape[0] == rows
        assert torch.equal(weight[:101], before)
    llama(vocab_size=100).save_pretrained(tmp_path / "small")
    text = convert("--to", "hf", "--input", tmp_path / "native", "--output", tmp_path / "no",
                   "--like", tmp_path / "small", code=2)  # fmt: skip
    assert "vocab_size: 101, in the reference 100" in text


CHANGES = {
    "num_hidden_layers": {"num_hidden_layers": 2},
    "rms_norm_eps": {"rms_norm_eps": 1e-6},
    "rope_theta": {"rope_theta": 1e4},
    "num_key_value_heads": {"num_key_value_heads": 8},
    "tie_word_embeddings": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("target", ["hf", "native", "megatron-lm"])
def test_another_architecture_is_refused_in_both_directions(tmp_path, convert, target):
    llama().save_pretrained(tmp_path / "source")
    for name, changes in CHANGES.items():
        folder = tmp_path / name
        folder.mkdir()
        config = llama(**changes).config
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder)
        text = convert("--to", target, "--input", tmp_path / "source", "--output", tmp_path / "no",
                       "--like", folder, code=2)  # fmt: skip
        assert f"--like {folder / 'config.json'}: {tmp_path / 'source'} differs" in text
        assert f"\n  {name}: " in text
    assert not (tmp_path / "no").exists()


def test_an_import_is_compared_with_the_reference(tmp_path, convert):
    llama(vocab_size=VOCABULARY).to(torch.bfloat16).save_pretrained(tmp_path / "ref")
    save_tokenizer(tmp_path / "ref")
    llama(vocab_size=VOCABULARY).save_pretrained(tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    text = convert("--to", "native", "--input", tmp_path / "source", "--output", tmp_path / "a",
                   "--like", tmp_path / "ref")  # fmt: skip
    assert "its weights are bf16, those of the output fp32" in text
    text = convert("--to", "native", "--input", tmp_path / "source", "--output", tmp_path / "b",
                   "--like", tmp_path / "ref", "--dtype", "bf16")  # fmt: skip
    assert "--like" not in text
    train(tmp_path / "ref" / "tokenizer.model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "ref" / name).unlink()
    text = convert("--to", "native", "--input", tmp_path / "source", "--output", tmp_path / "c",
                   "--like", tmp_path / "ref", code=2)  # fmt: skip
    assert f"--like {tmp_path / 'ref'}" in text


def test_unusable_references_are_refused_by_name(tmp_path, convert):
    llama().save_pretrained(tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    wrong = {
        "auto_map": {"auto_map": {"AutoModelForCausalLM": "code.Model"}},
        "quantization_config": {"quantization_config": {"quant_method": "gptq"}},
        "architectures": {"architectures": ["LlamaForSequenceClassification"]},
        "float64": {"dtype": "float64", "torch_dtype": "float64"},
        "model_type": {"model_type": "bert"},
        "hidden_size": {"hidden_size": "wide"},
    }
    for name, change in wrong.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({**config, **change}))
        text = convert("--to", "hf", "--input", tmp_path / "source", "--output", tmp_path / "no",
                       "--like", path, code=2)  # fmt: skip
        assert name in text
        assert str(path) in text
    text = convert("--to", "hf", "--input", tmp_path / "source", "--output", tmp_path / "no",
                   "--like", "llm-jp/llm-jp-3-13b", code=2)  # fmt: skip
    assert "hf download llm-jp/llm-jp-3-13b" in text
    shutil.copytree(tmp_path / "source", tmp_path / "ref")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "a.safetensors"}}
    (tmp_path / "ref" / "model.safetensors").unlink()
    (tmp_path / "ref" / "model.safetensors.index.json").write_text(json.dumps(index))
    text = convert("--to", "hf", "--input", tmp_path / "source", "--output", tmp_path / "no",
                   "--like", tmp_path / "ref", code=2)  # fmt: skip
    assert "missing: lm_head.weight" in text
