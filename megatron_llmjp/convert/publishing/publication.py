"""Publication of a conversion: model card in the output, upload after the conversion."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_llmjp.checkpoint.save_folder import HUGGING_FACE
from megatron_llmjp.convert.conversion import Conversion
from megatron_llmjp.convert.publishing.card import CARD, unfilled_fields
from megatron_llmjp.convert.publishing.hub import (
    HubRepository,
    check_repository,
    upload,
    upload_command,
)
from megatron_llmjp.convert.publishing.model_card import add_model_card
from megatron_llmjp.errors import EXIT_DONE, EXIT_FAILURE, UserError


def plan_publication(
    conversion: Conversion, output: Path, with_card: bool, name: str | None, is_public: bool
) -> HubRepository | None:
    """Add a model card to the output if it is requested, or the output is uploaded.

    Args:
        conversion: the planned conversion.
        output: folder of the output.
        with_card: ``--model-card``.
        name: ``--push-to-hub``.
        is_public: ``--public``.

    Returns:
        The repository to upload to; None without ``--push-to-hub``.

    Raises:
        UserError: the flags contradict each other, or do not apply to the conversion.
    """
    if is_public and name is None:
        raise UserError("--public: expected with --push-to-hub only")
    if name is not None and conversion.target != HUGGING_FACE:
        raise UserError(f"--push-to-hub: expected --to {HUGGING_FACE}, found {conversion.target}")
    if with_card or name is not None:
        add_model_card(conversion, name or output.absolute().name)
    return None if name is None else HubRepository(name, is_public)


def prepare_upload(repository: HubRepository | None) -> HubRepository | None:
    """Check the access to the Hub before the conversion, which may take hours.

    Raises:
        UserError: the repository cannot be written.
    """
    return None if repository is None else check_repository(repository)


def finish_publication(repository: HubRepository | None, folder: Path) -> int:
    """Print the fields of the model card to fill, and upload a complete folder.

    Returns:
        The exit code: a failed upload is no user error, as the conversion has succeeded.
    """
    if (folder / CARD).is_file():
        fields = unfilled_fields((folder / CARD).read_text(encoding="utf-8"))
        if fields:
            print(f"note: {folder / CARD} has fields to fill: {'; '.join(fields)}", file=sys.stderr)
    if repository is None:
        return EXIT_DONE
    try:
        address, notes = upload(repository, folder)
    except UserError as error:
        print(
            f"convert_checkpoint: {error}\n  {folder} is complete; to upload it again: "
            f"{upload_command(repository, folder)}",
            file=sys.stderr,
        )
        return EXIT_FAILURE
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"uploaded to {address}")
    return EXIT_DONE
