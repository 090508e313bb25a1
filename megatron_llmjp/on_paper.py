"""``--rehearse`` and ``--suggest-layout``: a run on paper, from its arguments to its exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_llmjp.config.checks import check
from megatron_llmjp.config.lint import Facts, lint
from megatron_llmjp.config.load import changed
from megatron_llmjp.config.rehearsal import Rehearsal
from megatron_llmjp.config.schema import Config
from megatron_llmjp.errors import EXIT_DONE, EXIT_USER_ERROR, UserError
from megatron_llmjp.plan.outlook import Outlook, decay_end, look_ahead
from megatron_llmjp.plan.outlook_text import show
from megatron_llmjp.plan.suggest import show_suggestions, suggest
from megatron_llmjp.tokenizers import load_tokenizer


def on_paper(config: Config, rehearsal: Rehearsal, argv: Sequence[str]) -> int:
    """Print a rehearsal or suggestions; the exit code.

    Raises:
        UserError: the run cannot be.
    """
    config = _with_vocabulary(config)
    if rehearsal.suggest:
        found = suggest(config, rehearsal)
        print(show_suggestions(config, rehearsal, found))
        return EXIT_DONE if found else EXIT_USER_ERROR
    check(config, rehearsal.world_size)
    outlook = look_ahead(config, rehearsal)
    for warning in _warnings(outlook):
        print(f"warning: {warning}", file=sys.stderr)
    print(show(outlook, rehearsal.mfu, _name(argv)), flush=True)
    ranks = _play(config, outlook)
    print(f"\n{ranks} distinct ranks were set up as megatron-core does, with these parameters")
    if not outlook.fits:
        print(
            f"error: the ranks of stage {outlook.worst} do not fit their GPU: --suggest-layout "
            "names layouts that do",
            file=sys.stderr,
        )
        return EXIT_USER_ERROR
    return EXIT_DONE


def _play(config: Config, outlook: Outlook) -> int:
    from megatron_llmjp.plan.rehearse import rehearse  # imports torch: seconds

    return len(rehearse(config, outlook.layout))


def _warnings(outlook: Outlook) -> list[str]:
    """What the lint says of the configuration, where the length of the run is known."""
    config, end = outlook.config, outlook.train_iters
    if end is None:
        return ["the length of the run is not known: give --train-iters or --fold-file"]
    facts = Facts(outlook.layout.world_size, end, decay_end(config) or end, validation_sets=1)
    return lint(config, facts)


def _with_vocabulary(config: Config) -> Config:
    if config.model.vocab_size is not None:
        return config
    if config.data.tokenizer_type is None:
        raise UserError("the vocabulary's size is not known: give --vocab-size or a tokenizer")
    tokenizer = load_tokenizer(config.data.tokenizer_type, config.data.tokenizer_model)
    return changed(config, vocab_size=tokenizer.vocab_size)


def _name(argv: Sequence[str]) -> str | None:
    """The preset that the run is made from."""
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        if word == "--config":
            return following
        if word.startswith("--config="):
            return word.removeprefix("--config=")
    return None
