"""What a device does: local LoRA training, importance, local pruning. Plain functions; no engine is known here."""
