"""Who takes part in a round of MergeSFL, and with how large a batch: plain mathematics, no model and no engine."""
