"""What carries the messages of a run: the local engine, and those that reach devices in processes of their own."""
