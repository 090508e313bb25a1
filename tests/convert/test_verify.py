"""--verify: megatron-core's model and transformers' compute the same."""

from __future__ import annotations

import re

import pytest
import torch

from tests.convert.hf_models import STYLES


def figures(text: str) -> tuple[float, float, float]:
    """Largest logit difference and the two losses."""
    number = r"([\d.e+-]+)"
    match = re.search(
        rf"difference {number} of logits up to .* loss {number} before, {number} after", text
    )
    assert match, text
    return float(match[1]), float(match[2]), float(match[3])


@pytest.mark.parametrize(
    ("style", "changes", "dtype"),
    [
        ("gpt2", {"activation_function": "gelu"}, torch.bfloat16),
        ("gpt_neox", {"hidden_act": "gelu_new"}, torch.float32),
    ],
)
def test_both_sides_agree(tmp_path, convert, style, changes, dtype):
    STYLES[style](**changes).to(dtype).save_pretrained(tmp_path / "hf")
    text = convert("--to", "native", "--input", tmp_path / "hf", "--output", tmp_path / "native",
                   "--verify")  # fmt: skip
    difference, before, after = figures(text)
    assert difference < 2e-5
    assert before == pytest.approx(after, abs=2e-6)


def test_llama_of_megatron_deepspeed_rounded_to_bf16(tmp_path, convert):
    STYLES["llama"](rope_theta=10000.0).save_pretrained(tmp_path / "hf")
    convert("--to", "megatron-deepspeed", "--input", tmp_path / "hf", "--output", tmp_path / "mds",
            "--target-tensor-parallel-size", 4)  # fmt: skip
    text = convert("--to", "hf", "--input", tmp_path / "mds", "--output", tmp_path / "back",
                   "--dtype", "bf16", "--verify")  # fmt: skip
    assert figures(text)[0] < 2e-5


def test_a_difference_leaves_nothing(tmp_path, convert, monkeypatch):
    """Names and shapes cannot tell that the wrong GELU is written; the logits do."""
    from megatron_llmjp.convert import hf_keys

    STYLES["gpt2"]().save_pretrained(tmp_path / "hf")
    convert("--to", "native", "--input", tmp_path / "hf", "--output", tmp_path / "native")
    monkeypatch.setitem(hf_keys.GELU_NAMES, "gelu_tanh", "gelu")
    text = convert("--to", "hf", "--input", tmp_path / "native", "--output", tmp_path / "o",
                   "--verify", code=1)  # fmt: skip
    assert "logits differ by" in text
    assert [p.name for p in tmp_path.glob("*o*")] == []
