"""SECURITY.md against the source: no unlisted call executes code or loads a pickle."""

from __future__ import annotations

import ast
import json
import subprocess
import sys

import pytest
import tokenizers

from megatron_llmjp.errors import UserError
from megatron_llmjp.tokenizers.hugging_face import HuggingFaceTokenizer
from tests.support.processes import ROOT

REQUIRED = {
    "from_pretrained": "trust_remote_code=False",
    "torch.load": "weights_only=True",
    "np.load": "allow_pickle=False",
}
"""Argument without which a call may execute code from a file."""

DANGEROUS = {
    *("exec", "eval", "__import__", "os.system", "os.popen", "runpy.run_path", "importlib.reload"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "shelve.open"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.Loader", "yaml.UnsafeLoader"),
    *("joblib.load", "dill.loads", "cloudpickle.loads", "numpy.load"),
}

LISTED = {
    ("data_tools/preprocess/selection/document_hooks.py", "exec"),  # --hooks
    ("megatron_llmjp/alerts/delivery.py", "a shell"),  # --alert-command
    ("megatron_llmjp/convert/follow/command.py", "a shell"),  # --follow ... --command
    # A job from the parent process, on the standard input of the child.
    ("megatron_llmjp/data/indices/worker.py", "pickle.loads"),
    # A block from the parent process, in memory that only its forks share.
    ("data_tools/preprocess/encoding/shared_slots.py", "pickle.loads"),
    # The adapter only: its base model is loaded before, without remote code.
    ("examples/sft/chat.py", "PeftModel.from_pretrained without trust_remote_code=False"),
}


def risky_calls(tree):
    """Yield what each dangerous call does."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, text = ast.unparse(node.func), ast.unparse(node)
        if name in DANGEROUS:
            yield name
        for function, argument in REQUIRED.items():
            if (name == function or name.endswith(f".{function}")) and argument not in text:
                yield f"{name} without {argument}"
        if "shell=True" in text or "'/bin/sh'" in text:
            yield "a shell"


def risks(*folders):
    found = set()
    for folder in folders:
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found |= {(path.relative_to(ROOT).as_posix(), what) for what in risky_calls(tree)}
    return found


def test_only_listed_calls_execute_code():
    assert risks("megatron_llmjp", "data_tools", "slurm", "examples") == LISTED
    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    for flag in ("--hooks", "--alert-command", "--command", "site.sh", "trust_remote_code=False"):
        assert flag in page


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "transformers.AutoTokenizer.from_pretrained(path)",
        "yaml.load(text, yaml.Loader)",
        "subprocess.run(text, shell=True)",
        "eval(text)",
    ],
)
def test_a_new_call_would_be_found(source):
    assert len(list(risky_calls(ast.parse(source)))) >= 1


CUSTOM_CODE = """\
from pathlib import Path
from transformers import PreTrainedTokenizerFast

Path({executed!r}).touch()


class Custom(PreTrainedTokenizerFast):
    pass
"""


def test_code_in_a_tokenizer_folder_is_not_executed(tmp_path, monkeypatch):
    """Transformers would ask whether to execute it, and take "y" from any standard input."""
    executed = tmp_path / "executed"
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "custom.py").write_text(CUSTOM_CODE.format(executed=str(executed)))
    settings = {
        "tokenizer_class": "Custom",
        "auto_map": {"AutoTokenizer": [None, "custom.Custom"]},
        "eos_token": "<eos>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    model = tokenizers.models.WordLevel({"a": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>")
    tokenizers.Tokenizer(model).save(str(folder / "tokenizer.json"))
    monkeypatch.setattr("builtins.input", lambda _prompt: "y")
    with pytest.raises(UserError, match="contains custom code"):
        HuggingFaceTokenizer(folder).include_special_tokens()
    assert not executed.exists()


def test_launch_scripts_are_not_executed(tmp_path):
    """``plan_folds --new`` parses the lists of datasets in a script."""
    script, executed = tmp_path / "data.sh", tmp_path / "executed"
    script.write_text(f'touch {executed}\nDATA_PATH="1 $(touch {executed})"\n')
    command = [sys.executable, "-m", "data_tools.plan_folds", "--new", str(tmp_path / "folds.yaml")]
    done = subprocess.run([*command, "--data-list", str(script)], cwd=ROOT, capture_output=True)
    assert done.returncode == 2 and b"Traceback" not in done.stderr
    assert not executed.exists()
