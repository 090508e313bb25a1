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
            is_private = api.model_info(repository.name).private
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
        siblings = api.model_info(repository.name).siblings or []
        stored = [sibling.rfilename for sibling in siblings]
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
    from huggingface_hub.errors import LocalTokenNotFoundError

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
    # The types of other errors depend on the HTTP library, which differs by version.
    except Exception as error:
        raise UserError(f"{where}{_explain(error, endpoint)}") from error


def _explain(error: Exception, endpoint: str) -> str:
    """Return the cause of a failed request, and what to do."""
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    text = re.sub(r"\s+", " ", str(cause)).strip()[:300]
    if status == _UNAUTHORIZED:
        return (
            f"{endpoint} does not accept the token; log in again with `hf auth login`, or set "
            "HF_TOKEN to a valid token"
        )
    if status in (_FORBIDDEN, _NOT_FOUND):
        return (
            "the token has no permission to write there; use one with write permission for its "
            f"namespace ({text})"
        )
    if status is not None:
        return f"{endpoint} answered with status {status}: {text}"
    if isinstance(cause, ValueError):  # an answer that huggingface_hub refuses
        return f"refused by {endpoint}: {text}"
    kind = type(cause).__name__
    return f"cannot reach {endpoint}: {kind}: {text}; check the network and HF_ENDPOINT"
