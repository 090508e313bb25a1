"""Selection of the checkpoint to resume from, and the configuration it provides. Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.checkpoint import resume_checks
from megatron_llmjp.checkpoint.manifest import AcceptedOverride, Manifest
from megatron_llmjp.checkpoint.resume_checks import RunHistory, SkippedRanges
from megatron_llmjp.checkpoint.save_folder import explain_load_failure
from megatron_llmjp.config.loading import (
    FROZEN_AT_RESUME,
    ConfigLayers,
    config_differences,
    load_config,
    replace_fields,
)
from megatron_llmjp.config.schema import (
    SECTION_OF,
    Config,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
)
from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.data.folds.schedule import Schedule
from megatron_llmjp.errors import UserError, download_hint
from megatron_llmjp.tokenizers import Tokenizer
from megatron_llmjp.tokenizers.registry import stored_tokenizer_fields

_UNREPORTED_FIELDS = {
    *(
        "save",
        "load",
        "finetune",
        "override_resume",
        "skip_iterations",
        "exit_interval",
        "eval_only",
        "allow_tokenizer_mismatch",
        "device",
    ),
    *LoggingConfig.model_fields,
}


BATCH_SIZE_FIELDS = ("global_batch_size", "rampup_batch_size")
"""Fields that determine the number of samples per iteration."""

_CONTEXT_FIELDS = {
    "seq_length",
    "max_position_embeddings",
    *(name for name in ModelConfig.model_fields if name.startswith(("rotary_base", "rope_"))),
    "rotary_seq_len_interpolation_factor",
    "use_rope_scaling",
    "position_embedding_type",
    *(name for name in ModelConfig.model_fields if name.startswith("yarn_")),
}
"""Fields that are changed to train on longer sequences."""

_TIKTOKEN_FIELDS = [name for name in DataConfig.model_fields if name.startswith("tiktoken_")]
_BATCH_FIELDS = (
    "micro_batch_size",
    "global_batch_size",
    "rampup_batch_size",
    "seed",
    "bf16",
    "fp16",
    "z_loss_strength",
)


@dataclass(frozen=True)
class Resume:
    """A complete checkpoint to start from."""

    folder: Path
    manifest: Manifest
    config: Config
    rejected: tuple[str, ...] = ()
    """Problems of newer checkpoints, which were rejected."""


def find_checkpoint(config: Config, damaged: Mapping[str, str]) -> Resume | None:
    """Find the newest complete checkpoint of ``load``, or of ``save`` without ``load``.

    Damaged checkpoints are skipped and listed in the result.

    Args:
        config: the requested configuration.
        damaged: problems of checkpoint folders that are known to be damaged.

    Returns:
        None if ``load`` is not given and ``save`` contains no checkpoint.

    Raises:
        UserError: ``load`` contains no complete checkpoint, or ``save`` contains only damaged ones.
    """
    source = config.checkpoint.load or config.checkpoint.save
    if source is None:
        return None
    root = Path(source)
    candidates, problems = _candidates(root)
    for folder in candidates:
        if str(folder) in damaged:
            problems.append(f"damaged checkpoint: {damaged[str(folder)]}")
            continue
        found = _open(folder, config, problems)
        if found is not None:
            return replace(found, rejected=tuple(problems))
    if problems or config.checkpoint.load is not None:
        reason = (
            "\n".join(problems)
            or explain_load_failure(root)
            or f"--load {root}: no complete checkpoint (iter_*) was found{download_hint(root)}"
        )
        raise UserError(reason)
    return None


def resume_config(
    config: Config, resume: Resume, schedule: Schedule, skipped: SkippedRanges
) -> tuple[Config, RunHistory, list[str]]:
    """Return the configuration and the run history of a resumed run, and notes for the user.

    The padded vocabulary size is the checkpoint's, so that the softmax is the same in every layout.
    The learning-rate schedule is the checkpoint's unless ``override_opt_param_scheduler`` is set.

    Args:
        config: the requested configuration.
        resume: the checkpoint.
        schedule: schedule of the requested data.
        skipped: samples that ``--skip-iterations`` skips.

    Raises:
        UserError: the checkpoint contains only weights, or a field or the consumed data differs in
            a way that would silently change the run.
    """
    if resume.manifest.contents != "full":
        raise UserError(
            f"{resume.folder} contains weights without optimizer state: add --finetune to start a "
            "new run from them"
        )
    config, problems, notes = _resume_fields(config, resume)
    found = resume_checks.history_differences(resume.manifest, schedule)
    if "folds" not in config.checkpoint.override_resume:
        problems += resume_checks.difference_errors(resume.folder, found)
    if problems:
        raise UserError("\n".join(problems))
    overrides = [
        AcceptedOverride(iteration=resume.manifest.iteration, difference=change) for change in found
    ]
    notes += [f"accepted by --override-resume folds: {change}" for change in found]
    history = RunHistory(skipped, (*resume.manifest.overrides, *overrides))
    return config, history, notes


def _resume_fields(config: Config, resume: Resume) -> tuple[Config, list[str], list[str]]:
    """Return the configuration with the fields kept from the checkpoint, errors, and notes."""
    saved, allowed = resume.config, set(config.checkpoint.override_resume)
    problems, notes = [], []
    if "padded_vocab_size" not in allowed and config.model.padded_vocab_size is None:
        config = replace_fields(config, padded_vocab_size=saved.padded_vocab_size)
    for name, (old, new) in config_differences(saved, config).items():
        if name == "optimizer":
            problems.append(
                f"optimizer is {new!r}, but {resume.folder} contains the state of {old!r}: set it "
                "back, or start a new run from its weights with --finetune"
            )
        elif name in FROZEN_AT_RESUME and name not in allowed:
            problems.append(
                f"{name} is {new!r}, but {resume.folder} was trained with {old!r}: set it back, or "
                f"name it on --override-resume {name}"
            )
            if name in _CONTEXT_FIELDS:
                problems[-1] += "; or start a new run from its weights with --finetune"
        elif name in OptimizerConfig.model_fields and not (
            config.optimizer.override_opt_param_scheduler
        ):
            # A default warm-up was shortened at the first start; the new value is not requested.
            is_default = name.startswith("lr_warmup_") and config.optimizer.lr_warmup_shorten
            if new is not None and name != "override_opt_param_scheduler" and not is_default:
                notes.append(
                    f"{name}: the checkpoint's {old!r} is used, not {new!r} "
                    "(--override-opt-param-scheduler uses the new value)"
                )
            config = replace_fields(config, **{name: old})
        elif name not in _UNREPORTED_FIELDS:
            notes.append(f"{name}: was {old!r}, now {new!r}")
    return config, problems, notes


def check_tokenizer(config: Config, resume: Resume, tokenizer: Tokenizer) -> list[str]:
    """Refuse to resume with a tokenizer whose files differ from the checkpoint's.

    Files are compared by size and checksum with the manifest, independent of their names. The
    tokenizer type is compared with the other configuration fields.

    Returns:
        A note if ``--override-resume tokenizer`` accepts the difference.

    Raises:
        UserError: a file that determines the token IDs is not in the checkpoint.
    """
    prefix = f"{manifests.TOKENIZER}/"
    stored = [entry for name, entry in resume.manifest.files.items() if name.startswith(prefix)]
    files = tokenizer.identifying_files()
    others = [path for path in files if manifests.file_entry(path) not in stored]
    if not others or not stored or config.data.tokenizer_type != resume.config.data.tokenizer_type:
        return []
    change = f"{others[0]} is not the tokenizer in {resume.folder / manifests.TOKENIZER}"
    if "tokenizer" in config.checkpoint.override_resume:
        return [f"{change}; accepted by --override-resume tokenizer"]
    raise UserError(
        f"{change}, with which the run was trained: token IDs may have another meaning. Use the "
        "checkpoint's tokenizer (--tokenizer-model), or accept the change with "
        "--override-resume tokenizer"
    )


def _candidates(root: Path) -> tuple[list[Path], list[str]]:
    """List the checkpoints to try, newest first, and problems of the tracker file.

    If the tracker names a checkpoint, newer ones are not tried: as in Megatron-LM, the tracker can
    be set back to resume from an earlier iteration.
    """
    if (root / manifests.MANIFEST).is_file():
        return [root], []
    iterations = manifests.complete_iterations(root)
    tracked, wrong = manifests.read_tracker(root)
    if tracked in iterations:
        iterations = [iteration for iteration in iterations if iteration <= tracked]
    elif tracked is not None:
        wrong = [f"{root / manifests.TRACKER} names iteration {tracked}, which is not complete"]
    folders = [root / manifests.folder_name(iteration) for iteration in reversed(iterations)]
    return folders, wrong if folders else []


def _open(folder: Path, requested: Config, problems: list[str]) -> Resume | None:
    try:
        manifest = manifests.read_manifest(folder)
        found = manifests.file_problems(folder, manifest)
        if not found:
            config = load_config(folder / manifests.CONFIG)
            found = _sample_count_problems(folder, manifest, config, requested)
        if not found:
            return Resume(folder, manifest, config)
        problems.append(f"damaged checkpoint: {found[0]}")
    except UserError as error:
        problems.append(f"damaged checkpoint: {error}")
    return None


def _sample_count_problems(
    folder: Path, manifest: Manifest, saved: Config, requested: Config
) -> list[str]:
    """Compare the consumed samples of a manifest without a checksum with the batch sizes.

    They may differ if the batch size was changed during the run with ``--override-resume``.
    """
    accepted = {*saved.checkpoint.override_resume, *requested.checkpoint.override_resume}
    is_ours = "megatron_llmjp" in manifest.versions  # converted checkpoints may count differently
    if manifest.checksum or not is_ours or accepted & set(BATCH_SIZE_FIELDS):
        return []
    expected = BatchSizeSchedule(saved).consumed_after(manifest.iteration)
    if manifest.consumed_samples == expected:
        return []
    return [
        f"{folder / manifests.MANIFEST}: consumed_samples is {manifest.consumed_samples}, but "
        f"iteration {manifest.iteration} ends at sample {expected} with the batch size of "
        f"{manifests.CONFIG}. If the batch size was changed during the run, add "
        f"--override-resume {BATCH_SIZE_FIELDS[0]}"
    ]


def add_stored_config(root: Path, layers: ConfigLayers, tokenizer_type: str | None) -> bool:
    """Add the stored configuration of a checkpoint below all flags, for a run that gives no model.

    From every checkpoint: model, sequence length and tokenizer. From a checkpoint of a run, also
    optimizer and batch settings, which a converted one (``contents`` is ``weights``) does not have.

    Args:
        root: the folder of ``--load`` or ``--save``.
        layers: receives the values.
        tokenizer_type: the one given by a flag, which decides which of the files are used.

    Returns:
        Whether ``root`` contains a checkpoint of this program.

    Raises:
        UserError: its configuration or manifest cannot be read.
    """
    if not (root / manifests.MANIFEST).is_file() and not manifests.complete_iterations(root):
        return False
    folder = manifests.newest_checkpoint(root)
    config, source = load_config(folder / manifests.CONFIG), str(folder / manifests.CONFIG)
    names = [*ModelConfig.model_fields, "seq_length", *_TIKTOKEN_FIELDS]
    if manifests.read_manifest(folder).contents == "full":
        names += [*OptimizerConfig.model_fields, *_BATCH_FIELDS, "tokenizer_type"]
    for name in names:
        value = getattr(getattr(config, SECTION_OF[name]), name)
        if value is not None and name != "padded_vocab_size":
            layers.set(name, value, source)
    files = folder / manifests.TOKENIZER
    found = stored_tokenizer_fields(files, tokenizer_type or config.data.tokenizer_type)
    if not found and tokenizer_type is None:
        found = stored_tokenizer_fields(files)
    for name, value in found.items():
        layers.set(name, value, str(files))
    return True
