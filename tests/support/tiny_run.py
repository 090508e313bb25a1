"""A small training run in a folder: text, datasets, fold file, checkpoints and metrics."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.forks import run_program

JAPANESE = "吾輩は猫である。"
ENGLISH = "Once upon a time there was a cat."
FOLDS = """\
folds:
  - name: general
    iterations: 6
    blend:
      ja: {path: data/ja_text_document, weight: 1}
      en: {path: data/en_text_document, weight: 1}
  - name: japanese
    iterations: 4
    blend:
      ja: {path: data/ja_text_document, weight: 1}
validation:
  valid: {path: data/en_text_document}
"""
TRAINING = """\
--config laptop-llama --fold-file folds.yaml --save checkpoints --tokenizer-type ByteLevelTokenizer
--num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --num-query-groups 2
--seq-length 32 --global-batch-size 4 --micro-batch-size 2 --lr 1e-2 --min-lr 1e-3
--lr-warmup-iters 1 --save-interval 5 --log-interval 1 --eval-interval 10 --eval-iters 1
--num-workers 0
"""


def make_tiny_run(folder: Path) -> Path:
    """Write ``data/*_text_document``, ``folds.yaml`` and ``checkpoints`` of 10 iterations."""
    (folder / "data").mkdir(parents=True)
    for name, text in (("ja", JAPANESE), ("en", ENGLISH)):
        lines = [json.dumps({"text": text * (1 + i % 2)}) for i in range(60)]
        (folder / f"data/{name}.jsonl").write_text("\n".join(lines) + "\n")
        words = f"--input data/{name}.jsonl --output-prefix data/{name} --append-eod --workers 1"
        words += " --tokenizer-type ByteLevelTokenizer"
        run("-m", "data_tools.preprocess_data", *words.split(), cwd=folder)
    (folder / "folds.yaml").write_text(FOLDS)
    run("-m", "pretrain_gpt", *TRAINING.split(), cwd=folder)
    return folder


def run(*words: str, cwd: Path) -> None:
    """Run a program in a folder, and require that it succeeds."""
    found = run_program(*words, cwd=cwd)
    assert found.returncode == 0, found.stderr
