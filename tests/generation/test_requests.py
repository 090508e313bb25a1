"""Requests of text generation endpoints, and JSON lines of prompts."""

from __future__ import annotations

import json

import pytest

from megatron_llmjp.errors import UserError
from megatron_llmjp.generation.records import read_records
from megatron_llmjp.generation.requests import parse_request, read_json_values
from megatron_llmjp.generation.settings import GenerationSettings

DEFAULTS = GenerationSettings(max_new_tokens=7)
PARAMETERS = {
    "temperature": 0.5,
    "top_p": 0.5,
    "max_new_tokens": 50,
    "do_sample": True,
    "return_full_text": False,
}


def test_a_request_becomes_settings_and_its_response_has_one_object_per_text():
    body = {"input_data": {"input_string": ["a", "b"], "parameters": PARAMETERS}}
    request = parse_request(body, DEFAULTS, "x")
    assert request.settings == GenerationSettings(50, True, 0.5, top_p=0.5)
    assert request.response(["1", "2"]) == [{"0": "1"}, {"0": "2"}]


def test_the_newer_form_and_the_default_of_return_full_text():
    request = parse_request({"input_data": ["a"], "params": {"top_k": 3}}, DEFAULTS, "x")
    assert request.settings == GenerationSettings(max_new_tokens=7, top_k=3)
    assert request.response([" b"]) == [{"0": "a b"}]


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ([], "f, line 1: expected an object such as"),
        ({"inputs": ["a"]}, "f, line 1: 'inputs' is not supported (possible: input_data, params)"),
        ({"input_data": {"input_string": "a"}}, 'expected a list of texts, found "a"'),
        ({"input_data": []}, "expected a list of texts, found []"),
        (
            {"input_data": {"input_string": ["a"], "parameters": {"num_beams": 4}}},
            "f, line 1: parameters: 'num_beams' is not supported (possible: max_new_tokens",
        ),
        (
            {"input_data": {"input_string": ["a"], "parameters": {"return_full_txt": True}}},
            "did you mean 'return_full_text'?",
        ),
        ({"input_data": ["a"], "params": {"top_p": "1"}}, "f, line 1: parameters: top_p: expected"),
        ({"input_data": ["a"], "params": {"return_full_text": 1}}, "expected true or false"),
        (
            {"input_data": {"input_string": ["a"], "parameters": {"seed": 1}}, "params": {"x": 1}},
            "both params and input_data.parameters",
        ),
    ],
)
def test_what_is_not_understood_is_refused_by_name(body, problem):
    with pytest.raises(UserError) as caught:
        parse_request(body, DEFAULTS, "f, line 1")
    assert problem in str(caught.value)


def test_values_on_lines_or_one_over_several_lines():
    lines = ['{"a": 1}\n', "\n", "2\n"]
    assert list(read_json_values(lines, "f")) == [("f, line 1", {"a": 1}), ("f, line 3", 2)]
    assert list(read_json_values(["{\n", '"a": 1\n', "}\n"], "f")) == [("f", {"a": 1})]
    with pytest.raises(UserError, match="f, line 2: invalid JSON"):
        list(read_json_values(["1\n", "{\n"], "f"))
    with pytest.raises(UserError, match="f: invalid JSON"):
        list(read_json_values(["{\n", "1\n"], "f"))


def test_records_keep_their_keys():
    records = read_records(['"a"\n', '{"prompt": "b", "id": 5}\n'], "f", None)
    assert [(r.prompt, r.content) for r in records] == [
        ("a", {"prompt": "a"}),
        ("b", {"prompt": "b", "id": 5}),
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"text": "a"}', 'f, line 1: expected the key "prompt" with a text'),
        ('{"messages": []}', "messages require --chat"),
        ("[1]", "expected a text or an object"),
        (json.dumps({"prompt": "a", "generated_text": "b"}), 'has the key "generated_text"'),
        ("", "f: is empty"),
    ],
)
def test_wrong_records_are_refused_with_their_line(line, problem):
    with pytest.raises(UserError) as caught:
        read_records([line + "\n"], "f", None)
    assert problem in str(caught.value)
