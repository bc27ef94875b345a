"""Results of a finished run: pipeline folders, LoRA and upgrade files, model cards, the hub."""
