"""From a fleet and a checkpoint to a LoRA plan on disk."""
