"""Supervised fine-tuning with TRL: all parameters, or with --lora an adapter of PEFT.

    python sft.py --model base --data conversations.jsonl --output tuned [--lora]

The loss is that of the replies only, which the chat template marks with {% generation %}.
"""

from __future__ import annotations

import argparse

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer


def main() -> None:
    """Train and save the model, or the adapter."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help='JSON lines with "messages"')
    parser.add_argument("--output", required=True)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--max-steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--max-length", type=int, default=128)
    arguments = parser.parse_args()
    config = SFTConfig(
        output_dir=arguments.output,
        max_steps=arguments.max_steps,
        learning_rate=arguments.learning_rate,
        per_device_train_batch_size=8,
        max_length=arguments.max_length,
        assistant_only_loss=True,
        lr_scheduler_type="cosine",
        logging_steps=max(1, arguments.max_steps // 6),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=False,  # True on a GPU
        model_init_kwargs={"dtype": "float32", "trust_remote_code": False},
        dataloader_pin_memory=False,
        seed=0,
    )
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=arguments.model,
        processing_class=AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=False),
        args=config,
        train_dataset=load_dataset("json", data_files=arguments.data, split="train"),
        peft_config=lora if arguments.lora else None,
    )
    trainer.train()
    trainer.save_model(arguments.output)


if __name__ == "__main__":
    main()
