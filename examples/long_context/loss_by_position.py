"""Losses of models by the position of the token, on documents that are long enough.

python examples/long_context/loss_by_position.py --dataset long_text_document --length 1024 \
    --before MODEL --after MODEL --native CHECKPOINT
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

TOLERANCE = 1e-4
"""Largest difference of the losses that transformers and megatron-core may have, in fp32."""


def main() -> int:
    """Print a table with a line for each range of positions."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset", required=True, help="tokenized dataset, without .bin")
    parser.add_argument("--length", type=int, required=True, help="number of positions")
    parser.add_argument("--samples", type=int, default=8, help="number of documents")
    parser.add_argument("--before", required=True, help="Hugging Face model folder")
    parser.add_argument("--after", required=True, help="Hugging Face model folder")
    parser.add_argument("--native", required=True, help="the checkpoint of --after")
    arguments = parser.parse_args()
    # Imported after the arguments are checked: they take seconds.
    import torch

    import megatron_llmjp as ml

    found = [d for d in ml.open_dataset(arguments.dataset) if len(d) > arguments.length]
    if not found:
        print(f"no document has more than {arguments.length} tokens", file=sys.stderr)
        return 1
    documents = [torch.from_numpy(d[: arguments.length + 1].astype("int64")) for d in found]
    documents = documents[: arguments.samples]
    losses = {
        "before": hugging_face_losses(arguments.before, documents),
        "after": hugging_face_losses(arguments.after, documents),
        "native": native_losses(arguments.native, documents),
    }
    print(f"{len(documents)} documents; losses of transformers before and after, and native")
    print("  positions    before     after    native")
    for start, end in ranges(arguments.length):
        means = (f"{loss[:, start:end].mean():10.5f}" for loss in losses.values())
        print(f"  {start:>4}-{end - 1:<5}", *means, sep="")
    difference = float((losses["after"] - losses["native"]).abs().max())
    print(f"largest difference of a token's loss, transformers and native: {difference:.1e}")
    return int(not difference <= TOLERANCE)


def ranges(length: int) -> list[tuple[int, int]]:
    """Return the ranges of positions: each as long as all before it."""
    ends = [length]
    while ends[0] > 64:
        ends.insert(0, ends[0] // 2)
    return list(zip([0, *ends], ends, strict=False))


def token_losses(logits: Any, tokens: Any) -> Any:
    """Return the loss of each token but the first."""
    import torch

    parts = zip(logits.split(512), tokens[1:].split(512), strict=True)  # less memory in double
    return torch.cat(
        [torch.nn.functional.cross_entropy(x.double(), y, reduction="none") for x, y in parts]
    )


def hugging_face_losses(model: str, documents: list[Any]) -> Any:
    """Return the losses ``[documents, positions]`` that transformers computes in fp32."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, trust_remote_code=False
    ).eval()
    with torch.no_grad():
        found = [token_losses(loaded(tokens[None, :-1]).logits[0], tokens) for tokens in documents]
    return torch.stack(found)


def native_losses(checkpoint: str, documents: list[Any]) -> Any:
    """Return the losses ``[documents, positions]`` that megatron-core computes in fp32."""
    import torch

    import megatron_llmjp as ml

    model = ml.load_model(checkpoint)
    return torch.stack([token_losses(model.logits(tokens[:-1]), tokens) for tokens in documents])


if __name__ == "__main__":
    raise SystemExit(main())
