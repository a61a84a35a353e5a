"""Data of a fleet: reading examples, dealing them out to devices, and turning them into batches."""
