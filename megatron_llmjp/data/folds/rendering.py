"""Fold files as text for people: one line per dataset and fold, with comments.

``fingerprint.dump_fold_file`` writes the complete copies in checkpoints.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_llmjp.data.folds.schema import BlendEntry, FoldFile
from megatron_llmjp.errors import UserError

_Blend = Mapping[str, BlendEntry]


def render_fold_file(
    file: FoldFile, folder: Path, comments: Mapping[str, str], header: Sequence[str] = ()
) -> str:
    """Return the text of a fold file, which gives the same schedule when it is read.

    Blends are declared once, under names. Paths are relative to the common folder of the datasets.

    Args:
        file: the fold file.
        folder: the folder in which the text will be stored.
        comments: comment of each dataset, by its path in ``file``.
        header: lines of a comment at the top.

    Raises:
        UserError: a path contains ``$``, which fold files cannot express.
    """
    for path in filter(lambda path: "$" in _absolute(path), file.dataset_paths()):
        raise UserError(
            f"{path}: fold files replace $VARIABLES in paths, so this path cannot be written: "
            "rename it, or use a symbolic link without '$'"
        )
    root = _common_folder(file)
    blends = _named_blends(file)
    lines = [*(f"# {line}" for line in header), f"seed: {file.seed}"]
    if file.sequence_length is not None:
        lines.append(f"sequence_length: {file.sequence_length}")
    shown = _shown_root(root, folder)
    lines += [f"root: {_scalar(shown)}"] if shown else []
    lines += ["", "blends:"]
    for name, blend in blends:
        lines.append(f"  {_scalar(name)}:")
        lines += _blend_lines(blend, root, comments)
    lines += ["", "folds:"]
    lines += [f"  - {_flow(_with_blend_name(fold, blends, root))}" for fold in file.folds]
    if file.validation:
        lines += ["", "validation:"]
    lines += [
        f"  {_scalar(name)}: {_flow(_with_blend_name(held_out, blends, root))}"
        for name, held_out in file.validation.items()
    ]
    if file.skip:
        lines += ["", "skip:", *(f"  - {_flow(entry.model_dump())}" for entry in file.skip)]
    return "\n".join(lines) + "\n"


def _common_folder(file: FoldFile) -> str:
    return os.path.commonpath([os.path.dirname(_absolute(path)) for path in file.dataset_paths()])  # noqa: PTH120


def _absolute(path: str) -> str:
    return os.path.abspath(path)  # noqa: PTH100


def _shown_root(root: str, folder: Path) -> str:
    """Return ``root`` as stored: relative if it is in the file's folder, empty if it is that."""
    base = _absolute(str(folder))
    if root == base:
        return ""
    return os.path.relpath(root, base) if os.path.commonpath([root, base]) == base else root


def _inside(root: str, path: str) -> str:
    """Return a path relative to ``root``; the reader of fold files expands ``~`` at its start."""
    found = os.path.relpath(_absolute(path), root)
    return f"./{found}" if found.startswith("~") else found


def _named_blends(file: FoldFile) -> list[tuple[str, _Blend]]:
    """Return the distinct blends with names: ``corpus``, or those of folds and validation sets."""
    holders = [*((f.name, f.blend) for f in file.folds)]
    holders += [(name, v.blend) for name, v in file.validation.items() if v.blend is not None]
    distinct: list[tuple[str, _Blend]] = []
    for name, blend in holders:
        if not any(blend == other for _, other in distinct):
            distinct.append((name, blend))
    return [("corpus", distinct[0][1])] if len(distinct) == 1 else distinct


def _blend_lines(blend: _Blend, root: str, comments: Mapping[str, str]) -> Iterator[str]:
    for name, entry in blend.items():
        comment = comments.get(entry.path, "")
        text = f"    {_scalar(name)}: {_flow(_entry(entry, root))}"
        yield f"{text}  # {comment}" if comment else text


def _entry(entry: BlendEntry, root: str) -> dict[str, Any]:
    content = entry.model_dump(mode="json", exclude_defaults=True)
    content["path"] = _inside(root, entry.path)
    for name in ("weight", "epochs"):
        if isinstance(content.get(name), float) and content[name].is_integer():
            content[name] = int(content[name])
    return content


def _with_blend_name(holder: Any, blends: list[tuple[str, _Blend]], root: str) -> dict[str, Any]:
    """Return a fold or validation set as plain values, with the name of its blend."""
    content: dict[str, Any] = holder.model_dump(mode="json", exclude_defaults=True)
    if "path" in content:
        content["path"] = _inside(root, content["path"])
    if content.pop("blend", None) is not None:
        content["blend"] = next(name for name, blend in blends if blend == holder.blend)
    if isinstance(content.get("epochs"), float) and content["epochs"].is_integer():
        content["epochs"] = int(content["epochs"])
    return content


def _flow(content: dict[str, Any]) -> str:
    text = yaml.safe_dump(
        content, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6
    )
    return text.strip()


def _scalar(text: str) -> str:
    return yaml.safe_dump(text, allow_unicode=True, width=10**6).split("\n...")[0].strip()
