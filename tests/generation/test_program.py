"""The program ``generate``, in a process of its own."""

from __future__ import annotations

import json

import pytest

from data_tools.generate import main
from tests.support.forks import run_program

NULL = ("--tokenizer-type", "NullTokenizer", "--vocab-size", 100)
PROMPTS = ["5 9 13", "7"]


def generate(checkpoint, *arguments, code=0):
    found = run_program("-m", "data_tools.generate", "--load", checkpoint, *map(str, arguments))
    assert found.returncode == code, found.stderr
    return found.stdout


@pytest.fixture(scope="module")
def native(checkpoints):
    return checkpoints["llama"] / "native"


@pytest.fixture(scope="module")
def texts(native):
    """The greedy text of each prompt, printed."""
    printed = [generate(native, *NULL, "--prompt", p, "--max-new-tokens", 5) for p in PROMPTS]
    for text in printed:
        assert len(text.split()) == 5 and text.endswith("\n") and text.startswith(" ")
    return [text.removesuffix("\n") for text in printed]


def test_json_lines(native, texts, tmp_path):
    (tmp_path / "in.jsonl").write_text('"5 9 13"\n{"prompt": "7", "id": "x"}\n')
    out = tmp_path / "out.jsonl"
    flags = ("--input", tmp_path / "in.jsonl", "--output", out, "--max-new-tokens", 5)
    assert generate(native, *NULL, *flags, "--batch-size", 2) == ""
    rest = {"finish_reason": "length", "generated_tokens": 5}
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        {"prompt": "5 9 13", "generated_text": texts[0], "prompt_tokens": 3, **rest},
        {"prompt": "7", "id": "x", "generated_text": texts[1], "prompt_tokens": 1, **rest},
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_requests(native, texts, tmp_path):
    parameters = {"temperature": 0.5, "top_p": 1e-9, "max_new_tokens": 5, "do_sample": True}
    body = {"input_data": {"input_string": PROMPTS, "parameters": parameters}}
    file = tmp_path / "request.json"
    file.write_text(json.dumps(body, indent=1))
    full = json.loads(generate(native, *NULL, "--requests", file))
    assert full == [{"0": prompt + text} for prompt, text in zip(PROMPTS, texts, strict=True)]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((), "expected --prompt, --input, --requests or --chat"),
        (("--prompt", ""), "--prompt: is empty; expected at least one token"),
        (("--prompt", "1 " * 64), "has 64 tokens, but the model has 64 positions"),
        (("--prompt", "x"), "--prompt: cannot be encoded"),
        (("--prompt", "1", "--add-bos"), "--add-bos: NullTokenizer has no BOS token"),
        (("--prompt", "1", "--top-p", "2"), "--top-p: expected a number above 0 and at most 1"),
        (("--prompt", "1", "--chat"), "has no chat template"),
        (("--prompt", "1", "--input", "f"), "--prompt and --input are mutually exclusive"),
        (("--input", "missing.jsonl"), "missing.jsonl: No such file or directory"),
    ],
)
def test_errors_of_arguments(native, arguments, problem, capsys):
    words = ["--load", native, *NULL, *arguments]
    try:
        code = main([str(word) for word in words])
    except SystemExit as exit_:
        code = exit_.code
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert problem in captured.err and len(captured.err.splitlines()) == 1


def test_errors_of_checkpoints(checkpoints, tmp_path, capsys):
    hf = checkpoints["gpt2"] / "hf"
    for folder, problem in (
        (tmp_path / "none", f"{tmp_path / 'none'}: does not exist"),
        (hf, f"convert_checkpoint --from hf --to native --input {hf} --output {hf}-native"),
        (tmp_path, "no complete checkpoint"),
        (checkpoints["gpt2"] / "native", "contains no tokenizer: give --tokenizer-type"),
    ):
        assert main(["--load", str(folder), "--prompt", "1"]) == 2
        assert problem in capsys.readouterr().err


def test_nothing_is_written_after_an_error(checkpoints, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('"1"\n"200"\n')
    words = ["--load", checkpoints["llama"] / "native", *NULL]
    words += ["--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl"]
    assert main([str(word) for word in words]) == 2
    assert "in.jsonl, line 2: cannot be encoded: an id is outside 0 to 100" in (
        capsys.readouterr().err
    )
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
