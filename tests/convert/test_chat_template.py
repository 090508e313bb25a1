"""``--chat-template``: stored with the tokenizer, and kept by conversions."""

from __future__ import annotations

import json

import pytest
import tokenizers
import transformers

from tests.convert.hf_models import llama

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% generation %}{{ m['content'] }}"
    "{% endgeneration %}{% if loop.last %}{% break %}{% endif %}\r\n{% endfor %}\n日本"
)
OLD = "{{ 'old' }}"
TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.fixture
def model(tmp_path):
    """A model with a fast tokenizer and a template of its own."""
    folder = tmp_path / "hf"
    llama().save_pretrained(folder)
    vocabulary = {"<s>": 0, "</s>": 1, "a": 2, "b": 3}
    words = tokenizers.models.WordLevel(vocabulary, unk_token="a")
    tokenizers.Tokenizer(words).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>",
                "chat_template": OLD}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "chat.jinja").write_bytes(TEMPLATE.encode())
    return folder


def rendered(folder, template=None):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(TALK, chat_template=template, tokenize=False)


def test_a_template_replaces_the_models_own_and_survives_round_trips(tmp_path, convert, model):
    assert rendered(model) == "old"
    words = ("--chat-template", tmp_path / "chat.jinja", "--output")
    convert(
        "--to", "hf", "--input", convert_to_native(tmp_path, convert, model), *words, tmp_path / "a"
    )
    convert("--to", "native", "--input", model, *words, tmp_path / "native2")
    convert("--to", "native", "--input", tmp_path / "native2", "--output", tmp_path / "native3")
    convert("--to", "hf", "--input", tmp_path / "native3", "--output", tmp_path / "b")
    for name in ("a", "b"):
        assert (tmp_path / name / "chat_template.jinja").read_bytes() == TEMPLATE.encode()
        settings = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        assert settings["chat_template"] == TEMPLATE  # for earlier versions of transformers
        assert rendered(tmp_path / name) == rendered(model, TEMPLATE) != "old"


def convert_to_native(tmp_path, convert, model):
    convert("--to", "native", "--input", model, "--output", tmp_path / "native")
    return tmp_path / "native"


def test_errors(tmp_path, convert, model):
    chat = tmp_path / "chat.jinja"

    def refused(target="hf"):
        return convert("--to", target, "--input", model, "--output", tmp_path / "o",
                       "--chat-template", chat, code=2)  # fmt: skip

    assert "megatron-lm checkpoints do not contain a tokenizer" in refused("megatron-lm")
    chat.write_text("a\n{% for m in messages %}{{ m }")
    assert "chat.jinja, line 2: not a Jinja template" in refused()
    chat.write_bytes(b"\xff")
    assert "is not UTF-8 text" in refused("native")
    chat.write_text(" \n")
    assert "is empty" in refused()
    chat.unlink()
    assert "cannot be read" in refused()
    assert not (tmp_path / "o").exists()
