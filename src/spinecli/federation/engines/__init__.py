"""What carries the messages of a run: the local engine, on a virtual clock."""
