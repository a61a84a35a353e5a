"""What a device does in a round: train, prune, measure importance, and say what came of it."""
