"""Publication of a converted model: model card, and upload to the Hugging Face Hub."""
