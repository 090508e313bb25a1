"""Text generation with a converted model, using transformers only.

python examples/quickstart/generate.py MODEL "日本の" "def read("
"""

from __future__ import annotations

import argparse


def main() -> int:
    """Print a continuation of each prompt."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="a Hugging Face model folder")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    arguments = parser.parse_args()
    # Imported after the arguments are checked: they take seconds.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.float32, trust_remote_code=False
    )
    torch.manual_seed(0)
    for prompt in arguments.prompts:
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        output = model.generate(
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=arguments.max_new_tokens,
            do_sample=True,
            temperature=0.7,
            top_p=0.9,
        )
        text = tokenizer.decode(output[0], skip_special_tokens=True)
        print(f"  {prompt!r} -> {text!r}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
