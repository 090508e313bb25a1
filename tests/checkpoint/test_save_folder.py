"""Save and load folders with checkpoints that a run would ignore and overwrite."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from megatron_llmjp import cli as pretrain_cli
from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.checkpoint.save_folder import check_save_folder
from megatron_llmjp.convert import cli
from megatron_llmjp.errors import UserError
from tests.support.datasets import write_folds
from tests.support.processes import ROOT
from tests.support.training import arguments

FIXTURE = ROOT / "tests/convert/fixtures/mds_gpt_tp2pp2dp2_bf16z1/ckpt"
"""A checkpoint written by Megatron-DeepSpeed."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The same model in each checkpoint format."""
    root = tmp_path_factory.mktemp("formats")
    made = {"megatron-deepspeed": FIXTURE}

    def convert(name: str, *words: object) -> None:
        made[name] = root / name
        assert cli.main([*map(str, words), "--output", str(made[name])]) == 0

    convert("native", "--to", "native", "--with-optimizer", "--input", FIXTURE)
    convert("hf", "--to", "hf", "--input", made["native"])
    for kind in ("torch", "torch_dist"):
        words = ("--to", "megatron-lm", "--ckpt-format", kind, "--input", made["native"])
        convert(f"megatron-lm-{kind}", *words)
    return made


@pytest.fixture(scope="module")
def fold_file(tmp_path_factory) -> Path:
    return write_folds(tmp_path_factory.mktemp("data"), (2, 2, 1))


def contents(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


FOREIGN = {
    "megatron-deepspeed": "a Megatron-DeepSpeed checkpoint",
    "megatron-lm-torch": r"a Megatron-LM checkpoint \(--ckpt-format torch, one folder per rank\)",
    "megatron-lm-torch_dist": r"a Megatron-LM checkpoint \(--ckpt-format torch_dist\)",
    "hf": "a Hugging Face model",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_another_programs_folder(folders, fold_file, tmp_path, capsys, name):
    """Refused in the dry run and the run without writing; the printed command works."""
    folder = folders[name]
    before = contents(folder)
    for flags in (("--save", folder), ("--save", folder, "--dry-run"), ("--load", folder)):
        assert pretrain_cli.main(arguments("laptop-gpt2", fold_file, *flags)) == 2
        message = capsys.readouterr().err
        assert re.search(f"{flags[0]} {re.escape(str(folder))}: .*is {FOREIGN[name]}", message)
    assert contents(folder) == before

    found = re.search(r"  (convert_checkpoint .*)\n  then train with --load (\S+)", message)
    assert found is not None, message
    _, *words = shlex.split(found[1])
    assert words[-1] == found[2]
    if name.startswith("megatron-lm"):
        words.remove("--with-optimizer")  # the converter writes only weights for Megatron-LM
    assert cli.main([*words[:-1], str(tmp_path / "native")]) == 0
    assert manifests.read_manifest(
        manifests.newest_checkpoint(tmp_path / "native")
    ).iteration == 2 * (name != "hf")


def test_own_checkpoints_without_manifests(folders, fold_file, tmp_path, capsys):
    save = tmp_path / "save"
    folder = save / "iter_0000002"
    words = arguments("laptop-gpt2", fold_file, "--save", save)
    for name in manifests.all_files(folders["native"] / folder.name):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((folders["native"] / folder.name / name).read_bytes())
    assert pretrain_cli.main(words) == 2
    message = capsys.readouterr().err
    assert f"{folder} is a checkpoint of this program without manifest.json" in message
    assert pretrain_cli.main(arguments("laptop-gpt2", fold_file, "--load", save)) == 2
    assert "without manifest.json" in capsys.readouterr().err
    assert [path.name for path in save.iterdir()] == [folder.name]


def lay(root: Path, *names: str) -> Path:
    """Write files with these names; the text after a colon is the content."""
    for entry_ in names:
        name, _, text = entry_.partition(":")
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["latest_checkpointed_iteration.txt:700"], "names checkpoint 700, but there is no"),
        (["latest:global_step10"], "names checkpoint global_step10, but"),
        (["iter_0000700/__0_0.distcp"], "a part of a torch_dist checkpoint"),
        (["iter_0000700/.metadata"], "a part of a torch_dist checkpoint"),
        (["iter_0000700/.metadata", "iter_0000700/common.pt"], "(--ckpt-format torch_dist)"),
        (["iter_0000700/.metadata", "iter_0000700/metadata.json"], "(--ckpt-format torch_dist)"),
        (["config.json", "pytorch_model-00001-of-00002.bin"], "a Hugging Face model"),
        (["config.json", "model.safetensors.index.json"], "a Hugging Face model"),
        (["global_step7/mp_rank_00_model_states.pt"], "a Megatron-DeepSpeed checkpoint"),
        (["iter_0000700/model.zarr/0"], "a checkpoint without any known files"),
        (["release/mp_rank_00/model_optim_rng.pt"], "a Megatron-LM checkpoint"),
        (["mp_rank_00_000/model_optim_rng.pt"], "a Megatron-LM checkpoint"),
        (["global_step7/layer_01-model_00-model_states.pt"], "a Megatron-DeepSpeed checkpoint"),
        (["manifest.json"], "use its parent folder: --save "),
        (['metrics.jsonl:{"step": 1, "loss": 2.0}\n'], "metrics.jsonl was written by another"),
    ],
)
def test_refused(tmp_path, names, said):
    with pytest.raises(UserError, match=re.escape(said)):
        check_save_folder(lay(tmp_path / "save", *names))


@pytest.mark.parametrize(
    "names",
    [
        [],
        [".iter_0000010.tmp/__0_0.distcp", ".run.lock", ".run.json", "logs/job7_0/rank_0000.log"],
        ["latest_checkpointed_iteration.txt:"],
        ['metrics.jsonl:{"iteration": 1, "lm lo\n{"iteration": 1, "consumed samples": 4}\n'],
        ["iter_0000002/manifest.json", "iter_0000003/config.yaml", "train.sh"],
    ],
)
def test_accepted(tmp_path, names):
    assert check_save_folder(lay(tmp_path / "save", *names)) == []


def test_a_folder_with_other_files(tmp_path):
    (note,) = check_save_folder(lay(tmp_path, "ja.bin", "ja.idx", "train.sh", "a/b", "z"))
    assert "contains other files (a, ja.bin, ja.idx, train.sh, ...)" in note
    assert check_save_folder(tmp_path / "z") == []  # start_checks refuses a file
    # Also if there are own checkpoints: the run would overwrite the other program's later.
    lay(tmp_path, "iter_0000002/manifest.json", "iter_0000009/mp_rank_00/model_optim_rng.pt")
    with pytest.raises(UserError, match="iter_0000009 is a Megatron-LM checkpoint"):
        check_save_folder(tmp_path)
