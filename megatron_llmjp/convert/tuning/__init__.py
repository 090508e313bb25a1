"""Files of instruction tuning: LoRA adapters of PEFT and chat templates."""
