"""MergeSFL's control module: who takes part in a round, and with what batch."""
