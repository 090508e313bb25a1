"""GPT-2's byte-level BPE as Megatron-LM's GPT2BPETokenizer: a vocabulary and its merges.

Source of the behaviour: Megatron-LM megatron/training/tokenizer (core 0.12), _GPT2BPETokenizer.
``<|endoftext|>`` ends a document; spelled out in a text it is text. Newer Megatron-LM (core 0.15
on) reads the files with transformers and finds it there.
"""

from __future__ import annotations

from pathlib import Path

import tokenizers

from megatron_llmjp.errors import UserError
from megatron_llmjp.tokenizers.hugging_face import FastTokenizer

EOD = "<|endoftext|>"


class GPT2BPETokenizer(FastTokenizer):
    """Byte-level BPE without special tokens in the text."""

    kind = "GPT2BPETokenizer"

    def __init__(self, vocab_file: Path, merge_file: Path | None = None) -> None:
        self.vocab_file, self.merge_file = _both(vocab_file, merge_file)
        try:
            model = tokenizers.models.BPE.from_file(str(self.vocab_file), str(self.merge_file))
        except Exception as error:  # the library raises bare Exception
            raise UserError(
                f"{self.vocab_file} and {self.merge_file}: not a vocabulary as JSON and its merges "
                f"({error}). Copy both files again."
            ) from error
        self.tokenizer = tokenizers.Tokenizer(model)
        self.tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.tokenizer.decoder = tokenizers.decoders.ByteLevel()
        self.vocab_size = max(self.tokenizer.get_vocab().values(), default=-1) + 1
        eod = self.tokenizer.token_to_id(EOD)
        if eod is None:
            raise UserError(f"{self.vocab_file}: has no {EOD} to end a document")
        self.eod_id = self.eos_id = self.bos_id = eod

    def files(self) -> dict[str, Path]:
        """Return the vocabulary and the merges, under the names that transformers looks for."""
        return {"vocab.json": self.vocab_file, "merges.txt": self.merge_file}


def _both(vocab: Path, merges: Path | None) -> tuple[Path, Path]:
    """Return both files; a folder holds them, and merges are looked for near the vocabulary."""
    if vocab.is_dir():
        found = sorted(vocab.glob("*vocab*.json"))
        vocab = found[0] if found else vocab / "vocab.json"
    if merges is None:
        named = vocab.with_name(vocab.name.replace("vocab", "merges")).with_suffix(".txt")
        merges = next(
            filter(Path.is_file, [named, *sorted(vocab.parent.glob("*merges*.txt"))]), named
        )
    for path, flag in ((vocab, "--vocab-file"), (merges, "--merge-file")):
        if not path.is_file():
            raise UserError(
                f"{flag} {path}: no such file. GPT2BPETokenizer needs a vocabulary as JSON and its "
                "merges, such as gpt2-vocab.json and gpt2-merges.txt"
            )
    return vocab, merges
