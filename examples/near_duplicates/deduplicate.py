"""Remove near-duplicates with datatrove's MinHash, as the step before preprocess_data.

    pip install "datatrove[io,processing]" spacy     # datatrove 0.10.1; Japanese: "spacy[ja]"
    python deduplicate.py --input corpus/ --output dedup/ --language jpn --tasks 16

writes ``dedup/output/00000.jsonl.gz`` ... : JSON lines with ``text``, ``id`` and ``metadata``,
which holds the other keys of the input. Then

    preprocess_data --input dedup/output --output-prefix data/ja --append-eod \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model tok.model \\
        --language-key metadata.lang --shuffle-seed 1

The settings are those of FineWeb: 14 buckets of 8 hashes of 5-grams of words, which find documents
with a similarity of 75 % with a probability of 77 %. On a cluster, replace LocalPipelineExecutor by
SlurmPipelineExecutor; the stages stay the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    """Parse the arguments and run the four stages."""
    parser = argparse.ArgumentParser(description="Remove near-duplicates with datatrove.")
    parser.add_argument("--input", required=True, help="folder of JSON lines, plain or .gz")
    parser.add_argument("--output", required=True, type=Path, help="folder to write to")
    parser.add_argument("--language", default="eng", help="ISO 639-3 code: jpn, eng ...")
    parser.add_argument("--tasks", type=int, default=4, help="at most one per input file")
    parser.add_argument("--workers", type=int, default=2, help="tasks that run at a time")
    args = parser.parse_args()
    deduplicate(args.input, args.output, args.language, args.tasks, args.workers)


def deduplicate(source: str, output: Path, language: str, tasks: int, workers: int) -> None:
    """Compute signatures, match and cluster them, and write one document of each cluster."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
    )
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers.jsonl import JsonlWriter

    config = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8)
    work = {name: str(output / name) for name in ("signatures", "buckets", "remove_ids", "output")}
    reader = JsonlReader(source)  # the first and the last stage must divide the files alike
    stages = [
        ([reader, MinhashDedupSignature(work["signatures"], config, language)], tasks),
        ([MinhashDedupBuckets(work["signatures"], work["buckets"], config=config)], 14),
        ([MinhashDedupCluster(work["buckets"], work["remove_ids"], config=config)], 1),
        ([reader, MinhashDedupFilter(work["remove_ids"]), JsonlWriter(work["output"])], tasks),
    ]
    for number, (pipeline, count) in enumerate(stages):
        executor = LocalPipelineExecutor(
            pipeline, tasks=count, workers=workers, logging_dir=str(output / f"logs/{number}")
        )
        executor.run()


if __name__ == "__main__":
    main()
