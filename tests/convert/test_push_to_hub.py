"""Uploads (``--push-to-hub``) by huggingface_hub to a stand-in of the Hub on localhost."""

from __future__ import annotations

import socket

import huggingface_hub
import pytest
from huggingface_hub import constants

from megatron_llmjp.convert.publishing import hub as hub_module
from tests.convert.hf_models import llama
from tests.support.hub_server import READ_ONLY_TOKEN, TOKEN, Repository, hub_server


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_server() as server:
        _use(monkeypatch, server.address, TOKEN)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        yield server


def _use(monkeypatch, address: str, token: str | None) -> None:
    """Use an endpoint and a token, as HF_ENDPOINT and HF_TOKEN of a new process."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # set by tests/conftest.py
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    else:
        monkeypatch.setenv("HF_TOKEN", token)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    llama().save_pretrained(folder)
    return folder


def test_a_private_repository_has_the_files_of_the_output(tmp_path, convert, hub, source):
    text = convert("--to", "hf", "--input", source, "--output", tmp_path / "out",
                   "--max-shard-size", "60KB", "--push-to-hub", "org/model")  # fmt: skip
    found = hub.repositories["org/model"]
    assert found.private
    assert found.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert "model-00001-of-" in " ".join(found.files)
    assert len(found.commits) == 1
    assert f"uploaded to {hub.address}/org/model/commit/" in text
    assert b"# org/model" in found.files["README.md"]


def test_a_repository_of_an_earlier_model_has_only_the_new_weights(tmp_path, convert, hub, source):
    """transformers would load the former model.safetensors; a card that was edited is kept."""
    files = {"model.safetensors": b"old", "README.md": b"edited", "LICENSE": b"text"}
    hub.repositories["tester/model"] = Repository(True, files)
    text = convert("--to", "hf", "--input", source, "--output", tmp_path / "out",
                   "--max-shard-size", "60KB", "--push-to-hub", "model")  # fmt: skip
    found = hub.repositories["tester/model"].files
    assert "model.safetensors" not in found
    assert found["README.md"] == b"edited"
    assert found["LICENSE"] == b"text"
    assert "README.md of tester/model exists and was kept" in text
    assert "removed from tester/model: model.safetensors" in text


def test_public_repositories_need_a_flag(tmp_path, convert, hub, source):
    hub.repositories["tester/model"] = Repository(False)
    words = ("--to", "hf", "--input", source, "--push-to-hub", "tester/model", "--output")
    assert "exists and is public; add --public" in convert(*words, tmp_path / "out", code=2)
    assert not (tmp_path / "out").exists()
    convert(*words, tmp_path / "out", "--public")
    assert "config.json" in hub.repositories["tester/model"].files
    convert("--to", "hf", "--input", source, "--push-to-hub", "tester/new", "--public",
            "--output", tmp_path / "new")  # fmt: skip
    assert not hub.repositories["tester/new"].private


def test_access_is_checked_before_the_conversion(tmp_path, convert, hub, source, monkeypatch):
    words = ("--to", "hf", "--input", source, "--output", tmp_path / "out", "--push-to-hub")
    for token, why in (
        (None, "no token found; log in with `hf auth login`, or set HF_TOKEN"),
        ("hf_wrong", "does not accept the token; log in again"),
        (READ_ONLY_TOKEN, "the token has no permission to write there"),
    ):
        _use(monkeypatch, hub.address, token)
        text = convert(*words, "org/model", code=2)
        assert f"--push-to-hub org/model: {why}" in text.replace(hub.address + " ", "")
    assert "--push-to-hub a/b/c: " in convert(*words, "a/b/c", code=2)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        _use(monkeypatch, f"http://127.0.0.1:{unused.getsockname()[1]}", TOKEN)
        assert "cannot reach http://127.0.0.1:" in convert(*words, "org/model", code=2)
    assert not (tmp_path / "out").exists()
    assert hub.repositories == {}


@pytest.mark.parametrize("failing", ["/upload/", "/commit/"])
def test_a_failed_upload_leaves_no_half_of_a_model(
    tmp_path, convert, hub, source, failing, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    hub.failing = failing
    text = convert("--to", "hf", "--input", source, "--output", tmp_path / "out",
                   "--push-to-hub", "org/model", code=1)  # fmt: skip
    assert "--push-to-hub org/model: " in text
    assert f"{tmp_path / 'out'} is complete; to upload it again: hf upload org/model" in text
    assert hub.repositories["org/model"].files == {}
    hub.failing = ""
    repository = hub_module.check_repository(hub_module.HubRepository("org/model"))
    hub_module.upload(repository, tmp_path / "out")
    assert "model.safetensors" in hub.repositories["org/model"].files


def test_an_interrupted_conversion_uploads_nothing(tmp_path, convert, hub, source, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_llmjp.convert.conversion.copy_tensors", interrupt)
    convert("--to", "hf", "--input", source, "--output", tmp_path / "out",
            "--push-to-hub", "org/model", code=1)  # fmt: skip
    assert hub.repositories["org/model"].files == {}


def test_nothing_is_sent_without_a_conversion_to_hugging_face(tmp_path, convert, hub, source):
    words = ("--input", source, "--output", tmp_path / "out")
    text = convert("--to", "native", *words, "--push-to-hub", "org/model", code=2)
    assert "--push-to-hub: expected --to hf, found native" in text
    text = convert("--to", "native", *words, "--model-card", code=2)
    assert "--model-card: expected --to hf, found native" in text
    assert "--public: expected with --push-to-hub" in convert(
        "--to", "hf", *words, "--public", code=2
    )
    convert("--to", "hf", *words, "--push-to-hub", "org/model", "--dry-run")
    assert hub.repositories == {}
    assert huggingface_hub.HfApi().endpoint == hub.address
