"""The whole chain on a small corpus: raw text -> tokenizer -> datasets -> folds -> training on
four processes -> another layout -> Hugging Face model -> generated text.

Each step says what it does and shows its command, which can be run by hand. `make quickstart`
runs this file; `--scale 0.1` makes the training shorter.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from megatron_llmjp.report.history import read_history

HERE = Path(__file__).parent
LANGUAGES = ("ja", "en", "code")
STOP_AT = 90
"""Iteration of the interruption: in the middle of the second fold."""


@dataclass
class Chain:
    """Runs the steps, and remembers what the summary tells."""

    root: Path
    scale: float
    programs: Path = Path(sys.executable).parent
    started: float = field(default_factory=time.monotonic)
    step: int = 0

    def say(self, text: str) -> None:
        """Announce a step."""
        self.step += 1
        print(f"\n\033[1m[{self.step}/9] {text}\033[0m", flush=True)

    def run(self, program: str, *arguments: object, expect: int = 0) -> None:
        """Show a command and run it; a wrong exit code ends the quickstart."""
        words = [str(a) for a in arguments]
        shown = [_relative(self.programs / program), *words]
        print(f"  $ {' '.join(map(shlex.quote, shown))}", flush=True)
        code = subprocess.run([str(self.programs / program), *words]).returncode
        if code != expect:
            print(f"\nquickstart: stopped, this command ended with code {code}", file=sys.stderr)
            sys.exit(code or 1)

    def script(self, name: str, *arguments: object) -> None:
        """Run one of this folder's scripts."""
        self.run("python", _relative(HERE / name), *arguments)


def main() -> int:
    """Run all steps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output-dir", type=Path, default=Path("quickstart_output"))
    parser.add_argument("--scale", type=float, default=1.0, help="length of the folds")
    parser.add_argument("--nproc-per-node", type=int, default=4)
    arguments = parser.parse_args()
    root = arguments.output_dir
    shutil.rmtree(root, ignore_errors=True)
    chain = Chain(root, arguments.scale)
    prepare_data(chain)
    total = write_folds(root / "folds.yaml", chain.scale)
    train(chain, total, arguments.nproc_per_node)
    publish(chain)
    summarize(chain)
    return 0


def prepare_data(chain: Chain) -> None:
    """Corpus, tokenizer, token datasets."""
    corpus, tokenizer = chain.root / "corpus", chain.root / "tokenizer"
    chain.say("Gather a corpus: own Japanese and English texts, and the code of Python's library")
    chain.script("make_corpus.py", "--output-dir", corpus)
    chain.say("Train a tokenizer: SentencePiece Unigram with byte fallback, as LLM-jp's are")
    inputs = [corpus / f"{language}.jsonl" for language in LANGUAGES]
    chain.run(
        "train_tokenizer", "--input", *inputs, "--vocab-size", 4096, "--max-input-mb", 2,
        "--output-dir", tokenizer,
    )  # fmt: skip
    chain.say("Tokenize: one dataset (.bin and .idx) per language, and one for its validation")
    for name in (*LANGUAGES, *(f"valid_{language}" for language in LANGUAGES)):
        chain.run(
            "preprocess_data", "--input", corpus / f"{name}.jsonl",
            "--output-prefix", chain.root / "data" / name,
            "--tokenizer-type", "SentencePieceTokenizer",
            "--tokenizer-model", tokenizer / "tokenizer.model", "--append-eod",
        )  # fmt: skip


def write_folds(path: Path, scale: float) -> int:
    """Put the fold file beside its data; returns the iterations of all folds."""
    counts: list[int] = []

    def scaled(match: re.Match[str]) -> str:
        counts.append(max(2, round(int(match[1]) * scale)))
        return f"iterations: {counts[-1]}"

    text = re.sub(r"iterations: (\d+)", scaled, (HERE / "folds.yaml").read_text(encoding="utf-8"))
    path.write_text(text, encoding="utf-8")
    return sum(counts)


def train(chain: Chain, total: int, processes: int) -> None:
    """Train, stop in the middle of a fold, and go on in another layout."""
    root = chain.root
    stop = max(3, round(STOP_AT * chain.scale))
    run = (
        "pretrain_gpt.py", "--config", "laptop-llama", "--fold-file", root / "folds.yaml",
        "--tokenizer-type", "SentencePieceTokenizer",
        "--tokenizer-model", root / "tokenizer" / "tokenizer.model",
        "--save", root / "checkpoints", "--log-interval", 10 if chain.scale >= 1 else 1,
        "--use-distributed-optimizer", "--nproc-per-node", processes,
    )  # fmt: skip
    chain.say(
        "Train on 4 processes, tensor 2 x pipeline 2 with sequence parallel and distributed\n"
        f"      optimizer; stop at iteration {stop}, in the middle of a fold"
    )
    print(f"  the data is declared in {root / 'folds.yaml'}: three folds and a refined last one")
    chain.run(
        "python", *run, "--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2,
        "--sequence-parallel", "--exit-interval", stop, expect=3,
    )  # fmt: skip
    chain.say("Go on in another layout: tensor 1 x pipeline 2 x data 2; same data, same curve")
    chain.run("python", *run, "--pipeline-model-parallel-size", 2)
    chain.say("Draw the run: loss with its folds, learning rate, speed and more")
    chain.run("report_run", root / "checkpoints", "--output-dir", root / "report")


def publish(chain: Chain) -> None:
    """Convert to Hugging Face and generate text with transformers."""
    model = chain.root / "hf_model"
    chain.say("Convert to Hugging Face; logits of both models are compared")
    chain.run(
        "convert_checkpoint", "--from", "native", "--to", "hf",
        "--input", chain.root / "checkpoints", "--output", model,
        "--tokenizer", chain.root / "tokenizer", "--verify",
    )  # fmt: skip
    chain.say("Generate text with transformers (a tiny model, minutes old: do not expect sense)")
    chain.script("generate.py", model, "日本の", "The function returns", "def __init__(self")


def summarize(chain: Chain) -> None:
    """What was made, and what to try next."""
    root = chain.root
    history = read_history(root / "checkpoints")
    training = history.training
    speed = median(history.values("tokens per second")[1])
    sets = ", ".join(f"{k} {v[-1]:.3f}" for k, (_, v) in history.validation_sets().items())
    chain.say(f"Done in {time.monotonic() - chain.started:.0f} s")
    print(
        f"""\
  loss             {training[0]["lm loss"]:.3f} at iteration {training[0]["iteration"]}, \
{training[-1]["lm loss"]:.3f} at iteration {training[-1]["iteration"]}
  validation loss  {sets}
  speed            {speed:,.0f} tokens/s (median)

  {root / "data"}            token datasets, readable by any Megatron
  {root / "checkpoints"}     checkpoints, metrics.jsonl, tensorboard events
  {root / "report"}          the run in pictures: open report.html in a browser
  {root / "hf_model"}        the model for transformers

  Try next:
    .venv/bin/tensorboard --logdir {root / "checkpoints" / "tensorboard"}
    .venv/bin/inspect_dataset --help
    .venv/bin/python pretrain_gpt.py --help    # other presets, layouts and fold files
    docs/architecture.md, docs/folds.md, docs/convert.md"""
    )


def _relative(path: Path) -> str:
    """A path as a user in this folder would type it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nquickstart: stopped", file=sys.stderr)
        sys.exit(130)
