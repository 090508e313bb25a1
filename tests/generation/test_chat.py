"""Chat templates, compared with transformers."""

from __future__ import annotations

import json

import pytest
import tokenizers
import transformers

from megatron_llmjp.errors import UserError
from megatron_llmjp.generation.chat import find_chat_template
from megatron_llmjp.generation.records import read_records

TEMPLATE = """\
{{ bos_token }}{% for message in messages %}
    {%- if message['role'] == 'assistant' %}
{{ '### 応答:\\n' + message['content'] | trim + eos_token }}
    {%- elif message['role'] not in ['user', 'system'] %}
{{ raise_exception('unknown role') }}
    {%- else %}
### {{ message | tojson }} {% if loop.index > 9 %}{% break %}{% endif %}
    {%- endif %}
{% endfor %}
{% if add_generation_prompt %}### 応答:
{% endif %}"""
MESSAGES = [
    {"role": "system", "content": "短く<答える>"},
    {"role": "user", "content": "Hello "},
    {"role": "assistant", "content": " Hi\n"},
    {"role": "user", "content": "猫?"},
]


@pytest.fixture
def folder(tmp_path):
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    fast.save(str(tmp_path / "tokenizer.json"))
    settings = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "__type": "AddedToken", "special": True},
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path


def test_the_prompt_is_that_of_transformers(folder):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert find_chat_template(folder).render(MESSAGES) == expected
    (folder / "chat_template.jinja").unlink()
    assert find_chat_template(folder) is None
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert find_chat_template(folder).render(MESSAGES) == expected


def test_records_with_messages(folder):
    template = find_chat_template(folder)
    lines = ['"Hello "\n', json.dumps({"messages": MESSAGES}) + "\n"]
    records = read_records(lines, "f", template)
    expected = [template.render(m) for m in (MESSAGES[1:2], MESSAGES)]
    assert [r.prompt for r in records] == expected


def test_a_template_that_refuses_or_attacks_is_an_error(folder):
    template = find_chat_template(folder)
    with pytest.raises(UserError, match=r"chat_template.jinja: the chat template fails: unknown"):
        template.render([{"role": "tool", "content": ""}])
    with pytest.raises(UserError, match="f, line 1: messages: expected messages"):
        read_records(['{"messages": [{"role": "user"}]}'], "f", template)
    (folder / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}")
    with pytest.raises(UserError, match="unsafe"):
        find_chat_template(folder).render(MESSAGES)
