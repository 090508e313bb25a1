"""Selection of the checkpoint to resume from when checkpoints or the tracker are damaged."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.checkpoint import resume
from megatron_llmjp.config.flags import parse
from megatron_llmjp.config.loading import dump_config
from megatron_llmjp.errors import UserError
from megatron_llmjp.tokenizers import registry

SMALL = (".metadata", "metadata.json", "common.pt", "folds.yaml", "tokenizer/tokenizer.model")


@pytest.fixture
def save(tmp_path):
    """A save folder with checkpoints of iterations 1 to 3, without tensors."""
    for iteration in (1, 2, 3):
        folder = tmp_path / manifests.folder_name(iteration)
        folder.mkdir()
        (folder / manifests.CONFIG).write_text(dump_config(config(tmp_path)))
        (folder / "__0_0.distcp").write_bytes(bytes(range(256)))
        (folder / manifests.TOKENIZER).mkdir()
        for name in SMALL:
            (folder / name).write_bytes(f"the content of {name}".encode())
        files = manifests.file_entries(folder, manifests.all_files(folder))
        manifests.write_manifest(
            folder,
            manifests.Manifest(
                iteration=iteration, consumed_samples=iteration, contents="full", files=files
            ),
        )
    (tmp_path / manifests.TRACKER).write_text("3\n")
    return tmp_path


def config(save, *flags):
    return parse(["--config", "laptop-llama", "--save", str(save), *map(str, flags)])[0]


def truncate(folder):
    (folder / "__0_0.distcp").write_bytes(b"1234")


def extend(folder):
    with (folder / "__0_0.distcp").open("ab") as stream:
        stream.write(b"1")


def lose(folder):
    (folder / "__0_0.distcp").unlink()


def lose_the_manifest(folder):
    (folder / manifests.MANIFEST).unlink()


def cut_the_manifest(folder):
    path = folder / manifests.MANIFEST
    path.write_bytes(path.read_bytes()[:100])


def copy_half(folder):
    lose(folder)
    (folder / manifests.CONFIG).write_text("model")


def garble_the_config(folder):
    (folder / manifests.CONFIG).write_text("x" * (folder / manifests.CONFIG).stat().st_size)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, r"__0_0\.distcp has 4 bytes instead of 256"),
        (extend, r"__0_0\.distcp has 257 bytes instead of 256"),
        (lose, r"__0_0\.distcp is missing"),
        (copy_half, r"is missing|has 5 bytes"),
        (cut_the_manifest, r"manifest\.json: cannot be read"),
        (garble_the_config, r"config\.yaml"),
        (lose_the_manifest, "names iteration 3, which is not complete"),
    ],
)
def test_damaged_checkpoint_is_skipped(save, damage, said):
    damage(save / "iter_0000003")
    before = sorted(save.rglob("*"))
    found = resume.find_checkpoint(config(save), {})
    assert found is not None
    assert found.manifest.iteration == 2
    assert len(found.rejected) == 1
    assert re.search(said, found.rejected[0])
    assert sorted(save.rglob("*")) == before  # loading writes nothing


def flip(path):
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


def make_a_folder(path):
    path.unlink()
    path.mkdir()


SMALL_DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "flipped": flip,
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "a folder": make_a_folder,
}


@pytest.mark.parametrize("kind", SMALL_DAMAGE)
@pytest.mark.parametrize("name", [*SMALL, manifests.CONFIG, manifests.MANIFEST])
def test_checksums_of_small_files_are_always_verified(save, name, kind):
    """Only tensor files need --verify-checkpoint, or a killed run, to be verified."""
    SMALL_DAMAGE[kind](save / "iter_0000003" / name)
    found = resume.find_checkpoint(config(save), {})
    assert found is not None
    assert found.manifest.iteration == 2
    (said,) = found.rejected
    assert str(save / "iter_0000003" / name) in said or "names iteration 3" in said
    for iteration in (1, 2):
        SMALL_DAMAGE[kind](save / manifests.folder_name(iteration) / name)
    if name == manifests.MANIFEST and kind in ("missing", "a folder"):
        assert resume.find_checkpoint(config(save), {}) is None  # no folder is a checkpoint
        return
    with pytest.raises(UserError, match="damaged checkpoint: ") as error:
        resume.find_checkpoint(config(save), {})
    assert str(error.value).count("damaged checkpoint: ") == 3


def test_an_edited_manifest_is_damaged(save):
    path = save / "iter_0000003" / manifests.MANIFEST
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content))  # other formatting, same content
    found = resume.find_checkpoint(config(save), {})
    assert found is not None and found.manifest.iteration == 3
    path.write_text(json.dumps({**content, "consumed_samples": 36}))
    found = resume.find_checkpoint(config(save), {})
    assert found is not None and found.manifest.iteration == 2
    assert "manifest.json: checksum mismatch" in found.rejected[0]


def test_manifest_without_a_checksum(save):
    """From earlier versions: accepted if the consumed samples match the batch size."""
    path = save / "iter_0000003" / manifests.MANIFEST
    content = json.loads(path.read_text())
    del content["checksum"]
    content["versions"] = {"megatron_llmjp": "0.1"}
    size = config(save).training.global_batch_size
    path.write_text(json.dumps({**content, "consumed_samples": 3 * size}))
    found = resume.find_checkpoint(config(save), {})
    assert found is not None and found.manifest.iteration == 3
    path.write_text(json.dumps({**content, "consumed_samples": 4 * size}))
    found = resume.find_checkpoint(config(save), {})
    assert found is not None and found.manifest.iteration == 2
    assert f"consumed_samples is {4 * size}, but iteration 3 ends at" in found.rejected[0]
    accepted = config(save, "--override-resume", "global_batch_size")
    found = resume.find_checkpoint(accepted, {})
    assert found is not None and found.manifest.iteration == 3


def test_a_renamed_folder_is_refused(save):
    (save / "iter_0000003").rename(save / "iter_0000009")
    found = resume.find_checkpoint(config(save), {})
    assert found is not None and found.manifest.iteration == 2
    assert "rename the folder to iter_0000003" in found.rejected[1]
    only = config(save, "--load", save / "iter_0000009")
    with pytest.raises(UserError, match="iter_0000009: contains the checkpoint of iteration 3"):
        resume.find_checkpoint(only, {})
    (save / "iter_0000009").rename(save / "best")  # a name without an iteration
    found = resume.find_checkpoint(config(save, "--load", save / "best"), {})
    assert found is not None and found.manifest.iteration == 3


def test_flipped_bit_is_found_by_checksums(save):
    folder = save / "iter_0000003"
    path = folder / "__0_0.distcp"
    contents = bytearray(path.read_bytes())
    contents[100] ^= 1
    path.write_bytes(contents)
    manifest = manifests.read_manifest(folder)
    assert manifests.file_problems(folder, manifest) == []
    (problem,) = manifests.file_problems(folder, manifest, checksums=True)
    found = resume.find_checkpoint(config(save), {str(folder): problem})
    assert found is not None
    assert found.manifest.iteration == 2
    assert found.rejected == (
        f"damaged checkpoint: {path} does not have the checksum of its manifest",
    )


@pytest.mark.parametrize(
    ("tracker", "iteration", "said"),
    [
        (b"2\n", 2, None),  # set back by the user, or the run was killed before updating it
        (b"", 3, "is empty"),
        (b"\0" * 8, 3, "instead of an iteration"),
        (b"release", 3, "contains 'release' instead of an iteration"),
        (b"7", 3, "names iteration 7, which is not complete"),
        (None, 3, None),
    ],
)
def test_tracker(save, tracker, iteration, said):
    path = save / manifests.TRACKER
    if tracker is None:
        path.unlink()
    else:
        path.write_bytes(tracker)
    found = resume.find_checkpoint(config(save), {})
    assert found is not None
    assert found.manifest.iteration == iteration
    assert len(found.rejected) == (said is not None)
    assert said is None or said in found.rejected[0]


def test_tracker_set_back_is_respected(save):
    """Checkpoints newer than the tracker are not resumed from."""
    (save / manifests.TRACKER).write_text("2\n")
    truncate(save / "iter_0000002")
    found = resume.find_checkpoint(config(save), {})
    assert found is not None
    assert found.manifest.iteration == 1


def test_no_complete_checkpoint_is_an_error(save):
    for iteration in (1, 2, 3):
        truncate(save / manifests.folder_name(iteration))
    with pytest.raises(UserError, match="damaged checkpoint") as error:
        resume.find_checkpoint(config(save), {})
    assert str(error.value).count("has 4 bytes instead of 256") == 3
    for folder in save.glob("iter_*"):
        shutil.rmtree(folder)
    (save / manifests.TRACKER).write_text("")
    assert resume.find_checkpoint(config(save), {}) is None


def test_generation_settings_are_not_read_as_a_tokenizer():
    assert f"{manifests.TOKENIZER}/{registry.GENERATION_FILE}" == manifests.GENERATION
