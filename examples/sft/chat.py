"""Replies of a model through its chat template; with --base, compare with base and adapter in PEFT.

python chat.py merged "日本の首都はどこですか。"
python chat.py merged --base base --adapter adapter "日本の首都はどこですか。"
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> int:
    """Print a reply to each message; exit with 1 if the logits differ from those of PEFT."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("messages", nargs="+")
    parser.add_argument("--base", help="model that the adapter was trained on")
    parser.add_argument("--adapter")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=False)
    model = load(arguments.model).eval()
    largest = 0.0
    for message in arguments.messages:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], add_generation_prompt=True, tokenize=False
        )
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        ids = inputs["input_ids"]
        output = model.generate(
            ids, attention_mask=inputs["attention_mask"], max_new_tokens=20, do_sample=False
        )
        reply = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        print(f"  {message!r} -> {reply!r}")
        if arguments.base:
            largest = max(largest, difference(model, arguments.base, arguments.adapter, ids))
    if arguments.base:
        print(f"  largest difference of the logits from base and adapter in PEFT: {largest:.1e}")
    return int(largest > 1e-3)


def load(folder: str) -> torch.nn.Module:
    """Return a model in fp32; Python files in its folder are not executed."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    )


def difference(model: torch.nn.Module, base: str, adapter: str, ids: torch.Tensor) -> float:
    """Return the largest difference of the logits between the model and base with adapter."""
    from peft import PeftModel

    tuned = PeftModel.from_pretrained(load(base), adapter).eval()
    with torch.no_grad():
        return (model(ids).logits - tuned(input_ids=ids).logits).abs().max().item()


if __name__ == "__main__":
    raise SystemExit(main())
