"""LoRA adapters: merged like peft does, and extracted from two checkpoints."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.convert.hf_models import gpt2, gpt_neox, llama, state
from tests.convert.test_comparison import FIXTURES, changed

PEFT = FIXTURES / "peft"
TOLERANCE = {"rtol": 1e-6, "atol": 1e-7}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("source", ["hf", "native", "megatron-lm"])
def test_a_merge_is_that_of_peft(tmp_path, convert, kind, source):
    """Into weights of any format; the vocabulary of the others is padded."""
    folder = PEFT / kind / "base"
    if source != "hf":
        folder = tmp_path / "source"
        convert("--to", source, "--input", PEFT / kind / "base", "--output", folder,
                "--target-tensor-parallel-size", 2)  # fmt: skip
    text = convert("--to", "hf", "--input", folder, "--adapter", PEFT / kind / "adapter",
                   "--vocab-size", 20, "--output", tmp_path / "merged")  # fmt: skip
    assert f"base model is {kind}/base" in text
    expected, found = state(PEFT / kind / "merged"), state(tmp_path / "merged")
    assert found.keys() == expected.keys()
    before = state(PEFT / kind / "base")
    changes = [key for key in expected if not torch.equal(expected[key], before[key])]
    assert len(changes) == {"llama": 8, "gpt2": 9}[kind]
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, **TOLERANCE)
        assert (key in changes) or torch.equal(found[key], tensor)


def test_sums_are_rounded_once(tmp_path, convert):
    """bf16 weights plus an fp32 adapter; with --dtype fp32 not rounded at all."""
    base = PEFT / "llama" / "base"
    half = changed(
        tmp_path / "half", base, lambda t: t.update({k: v.bfloat16() for k, v in t.items()})
    )
    words = ("--to", "hf", "--input", half, "--adapter", PEFT / "llama" / "adapter", "--output")
    convert(*words, tmp_path / "bf16")
    convert(*words, tmp_path / "fp32", "--dtype", "fp32")
    delta = {k: v - state(base)[k] for k, v in state(PEFT / "llama" / "merged").items()}
    key = "model.layers.1.self_attn.v_proj.weight"
    exact = state(half)[key].float() + delta[key]
    torch.testing.assert_close(state(tmp_path / "fp32")[key], exact, rtol=1e-6, atol=1e-6)
    assert torch.equal(state(tmp_path / "bf16")[key], state(tmp_path / "fp32")[key].bfloat16())


REFUSED = {
    "dora": ({"use_dora": True}, "use_dora True"),
    "new option": ({"flux": {"x": 1}}, "flux"),
    "pissa": ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
    "other type": ({"peft_type": "IA3"}, "peft_type 'IA3'"),
    "orientation": ({"fan_in_fan_out": True}, "fan_in_fan_out True does not fit LlamaForCausalLM"),
    "rank": ({"rank_pattern": {}}, "expected (4, 24) and (16, 4) for rank 4"),
    "number": ({"r": 0}, "r 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_adapters_are_refused(tmp_path, convert, case):
    changes, message = REFUSED[case]
    adapter = shutil.copytree(PEFT / "llama" / "adapter", tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert message in merge(convert, tmp_path, PEFT / "llama" / "base", adapter)


def merge(convert, tmp_path, base, adapter, *more):
    words = ("--input", base, "--adapter", adapter, "--output", tmp_path / "o", *more)
    text = convert("--to", "native", *words, code=2)
    assert not (tmp_path / "o").exists()
    return text


def test_adapters_of_other_models_are_refused(tmp_path, convert):
    llama().save_pretrained(tmp_path / "other")
    base, adapter = PEFT / "llama" / "base", PEFT / "llama" / "adapter"
    text = merge(convert, tmp_path, tmp_path / "other", adapter)
    assert "embed_tokens.weight has shape (20, 16), the model's (101, 64)" in text
    gpt2().save_pretrained(tmp_path / "gpt2")
    assert "fan_in_fan_out" in merge(convert, tmp_path, tmp_path / "gpt2", adapter)
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    assert "tied" in merge(convert, tmp_path, tmp_path / "tied", adapter)
    assert "adapter_config.json is missing" in merge(convert, tmp_path, base, base)
    assert "is not a folder" in merge(convert, tmp_path, base, tmp_path / "no")
    assert "Adam's moments" in merge(convert, tmp_path, base, adapter, "--with-optimizer")
    assert "--adapter" in merge(convert, tmp_path, base, adapter, "--verify")
    half = shutil.copytree(adapter, tmp_path / "half")
    tensors = load_file(half / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    save_file(tensors, half / "adapter_model.safetensors")
    assert "only one of the matrices" in merge(convert, tmp_path, base, half)


def tune(tmp_path, rank):
    """Return a model and one with rank-3 differences in linear layers, another norm and head."""
    model = llama()
    model.save_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(3)

    def change(tensors):
        for key, tensor in tensors.items():
            if "_proj" in key:
                a, b = (torch.randn(n, rank, generator=generator) for n in tensor.shape)
                tensor += 0.1 * a @ b.t()
        tensors["model.norm.weight"][1] += 0.5
        tensors["lm_head.weight"][7] -= 0.5

    return changed(tmp_path / "tuned", tmp_path / "base", change)


def test_an_adapter_of_full_rank_restores_the_tuned_model(tmp_path, convert):
    tuned = tune(tmp_path, 3)
    convert("--to", "native", "--input", tuned, "--output", tmp_path / "native")
    text = convert("extract-adapter", tmp_path / "base", tmp_path / "native", "--rank", 3,
                   "--output", tmp_path / "adapter")  # fmt: skip
    assert float(text.split("error ")[1].split()[0]) < 1e-5
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["lm_head", "norm"]
    convert("--to", "hf", "--input", tmp_path / "base", "--adapter", tmp_path / "adapter",
            "--output", tmp_path / "merged")  # fmt: skip
    for key, tensor in state(tmp_path / "merged").items():
        torch.testing.assert_close(tensor, state(tuned)[key], rtol=1e-5, atol=1e-5)


def test_the_error_is_that_of_the_best_approximation(tmp_path, convert):
    """Eckart and Young: the norm of the omitted singular values, by numpy."""
    tuned = tune(tmp_path, 8)
    text = convert("extract-adapter", tmp_path / "base", tuned, "--rank", 2, "--linear-only",
                   "--output", tmp_path / "adapter")  # fmt: skip
    before, after = state(tmp_path / "base"), state(tuned)
    total = missing = worst = 0.0
    for key in before:
        delta = (after[key].double() - before[key].double()).numpy()
        omitted = np.sum(delta**2)
        total += omitted
        if "_proj" in key:
            omitted = np.sum(np.linalg.svd(delta, compute_uv=False)[2:] ** 2)
            worst = max(worst, np.sqrt(omitted / np.sum(delta**2)))
        missing += omitted
    assert f"error {np.sqrt(missing / total):.3g} of the difference" in text
    assert "2 tensors differ that the adapter does not contain: model.norm.weight, lm_head" in text
    assert "at most 1 in " in text and worst < 1.0


def test_large_matrices_are_decomposed_approximately(monkeypatch):
    from megatron_llmjp.convert.tuning import extract

    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(96, 80, generator=generator) @ torch.diag(0.9 ** torch.arange(80.0))
    monkeypatch.setattr(extract, "EXACT_SIZE", 8)
    a, b = extract.low_rank(matrix, 4)
    best = np.sqrt(np.sum(np.linalg.svd(matrix.double().numpy(), compute_uv=False)[4:] ** 2))
    assert float((matrix - b @ a).norm()) == pytest.approx(best, rel=1e-3)
    assert torch.equal(extract.low_rank(matrix, 4)[0], a)


def test_models_that_cannot_be_compared_are_refused(tmp_path, convert):
    tuned = tune(tmp_path, 2)

    def refused(*words):
        return convert("extract-adapter", *words, "--output", tmp_path / "o", code=2)

    llama(rope_theta=7.0).save_pretrained(tmp_path / "other")
    assert "rotary_base 5000 / 7" in refused(tmp_path / "base", tmp_path / "other", "--rank", 2)
    assert "must not exceed 48" in refused(tmp_path / "base", tuned, "--rank", 100)
    nan = changed(
        tmp_path / "nan", tuned, lambda t: t["model.layers.0.mlp.up_proj.weight"].fill_(torch.inf)
    )
    assert "up_proj.weight is not finite" in refused(tmp_path / "base", nan, "--rank", 2)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("build", [gpt2, gpt_neox])
def test_an_adapter_restores_other_architectures(tmp_path, convert, build):
    """Conv1D; an output layer with another name in files than in peft."""
    build().save_pretrained(tmp_path / "base")
    tuned = changed(tmp_path / "tuned", tmp_path / "base", add_low_rank)
    convert("extract-adapter", tmp_path / "base", tuned, "--rank", 2,
            "--output", tmp_path / "adapter")  # fmt: skip
    convert("--to", "hf", "--input", tmp_path / "base", "--adapter", tmp_path / "adapter",
            "--output", tmp_path / "merged")  # fmt: skip
    for key, tensor in state(tmp_path / "merged").items():
        torch.testing.assert_close(tensor, state(tuned)[key], rtol=1e-5, atol=1e-5)


def add_low_rank(tensors):
    """Add matrices of rank 2 to all matrices but the embeddings."""
    generator = torch.Generator().manual_seed(6)
    for key, tensor in tensors.items():
        if tensor.dim() == 2 and not any(word in key for word in ("wte", "wpe", "embed_in")):
            a, b = (torch.randn(n, 2, generator=generator) for n in tensor.shape)
            tensor += 0.1 * a @ b.t()


@pytest.mark.parametrize("build", [llama, gpt2, gpt_neox])
def test_peft_loads_an_extracted_adapter(tmp_path, convert, build):
    peft = pytest.importorskip("peft", reason="needs peft: pip install peft")
    import transformers

    build().save_pretrained(tmp_path / "base")
    tuned = changed(tmp_path / "tuned", tmp_path / "base", add_low_rank)
    convert("extract-adapter", tmp_path / "base", tuned, "--rank", 2,
            "--output", tmp_path / "adapter")  # fmt: skip
    tokens = torch.arange(24).reshape(2, 12)

    def logits(model):
        return model.eval()(tokens).logits.detach()

    auto = transformers.AutoModelForCausalLM
    expected = logits(auto.from_pretrained(tuned))
    model = peft.PeftModel.from_pretrained(
        auto.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-3)
    assert not torch.allclose(logits(auto.from_pretrained(tmp_path / "base")), expected, atol=0.1)
