"""Upload of a complete model folder to the Hugging Face Hub (``--push-to-hub``).

Access is checked before the conversion. The folder is uploaded after it was renamed to its final
name, in one commit: readers of the repository see the former model or the new one.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_llmjp.convert.publishing.card import CARD
from megatron_llmjp.errors import UserError

_WEIGHTS = (
    *("model*.safetensors", "*.safetensors.index.json"),
    *("pytorch_model*.bin", "pytorch_model.bin.index.json"),
)
"""Weight files of a model. Files of an earlier model would be loaded instead of the new ones."""
_COMMIT = "Upload model converted by megatron_llmjp"
_UNAUTHORIZED, _FORBIDDEN, _NOT_FOUND = 401, 403, 404


@dataclass(frozen=True)
class HubRepository:
    """A repository of the Hub: ``namespace/name``, or a name in the user's own namespace."""

    name: str
    is_public: bool = False


def check_repository(repository: HubRepository) -> HubRepository:
    """Create the repository, or check that an existing one can be used.

    Returns:
        The repository with its namespace.

    Raises:
        UserError: the name is invalid, the user is not logged in or has no permission, an existing
            repository is public without ``--public``, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository.name)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub {repository.name}: {error}") from error
    api = HfApi()
    with _clear_errors(repository, api.endpoint):
        user = api.whoami()["name"]
        if "/" not in repository.name:
            repository = replace(repository, name=f"{user}/{repository.name}")
        try:
            is_private = api.repo_info(repository.name).private
        except RepositoryNotFoundError:
            api.create_repo(repository.name, private=not repository.is_public)
            return repository
    if not is_private and not repository.is_public:
        raise UserError(
            f"--push-to-hub {repository.name}: the repository exists and is public; add --public "
            "to publish the model in it, or choose another name"
        )
    return repository


def upload(repository: HubRepository, folder: Path) -> tuple[str, list[str]]:
    """Upload a folder in one commit.

    Weight files that the folder does not have are removed from the repository; its model card, if
    it has one, is kept.

    Args:
        repository: result of :func:`check_repository`.
        folder: a complete model.

    Returns:
        Address of the commit, and notes for the user.

    Raises:
        UserError: the user has no permission, or the Hub cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    with _clear_errors(repository, api.endpoint):
        stored = api.list_repo_files(repository.name)
        paths = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
        notes = []
        if CARD in stored and paths.pop(CARD, None) is not None:
            notes.append(f"{CARD} of {repository.name} exists and was kept")
        stale = [name for name in stored if name not in paths and _is_weight_file(name)]
        if stale:
            notes.append(f"removed from {repository.name}: {', '.join(stale)}")
        commit = api.create_commit(
            repository.name,
            [
                *(CommitOperationAdd(name, str(path)) for name, path in paths.items()),
                *(CommitOperationDelete(name) for name in stale),
            ],
            commit_message=_COMMIT,
        )
    return str(commit.commit_url), notes


def upload_command(repository: HubRepository, folder: Path) -> str:
    """Return the command of huggingface_hub that uploads a folder again."""
    return f"hf upload {repository.name} {folder}"


def _is_weight_file(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _WEIGHTS)


@contextmanager
def _clear_errors(repository: HubRepository, endpoint: str) -> Iterator[None]:
    """Convert errors of the Hub and of the network to user errors.

    Raises:
        UserError: with the cause and what to do.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    where = f"--push-to-hub {repository.name}: "
    try:
        yield
    except UserError:
        raise
    except LocalTokenNotFoundError:
        raise UserError(
            f"{where}no token found; log in with `hf auth login`, or set HF_TOKEN to a token with "
            "write permission"
        ) from None
    except HfHubHTTPError as error:
        raise UserError(
            f"{where}{_explain(error.response.status_code, endpoint, error)}"
        ) from error
    except ValueError as error:  # of huggingface_hub: the server refused the model card
        raise UserError(f"{where}refused by {endpoint}: {_one_line(error)}") from error
    # Network errors are those of requests, httpx or its successors, by version of the library.
    except Exception as error:
        kind = type(error).__name__
        raise UserError(
            f"{where}cannot reach {endpoint}: {kind}: {_one_line(error)}; check the network and "
            "HF_ENDPOINT"
        ) from error


def _explain(status: int, endpoint: str, error: Exception) -> str:
    if status == _UNAUTHORIZED:
        return (
            f"{endpoint} does not accept the token; log in again with `hf auth login`, or set "
            "HF_TOKEN to a valid token"
        )
    if status in (_FORBIDDEN, _NOT_FOUND):
        return (
            f"the token has no permission to write there; use one with write permission for its "
            f"namespace ({_one_line(error)})"
        )
    return f"{endpoint} answered with status {status}: {_one_line(error)}"


def _one_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()[:300]
