"""A model on disk: lazy reading, families as data, physical cutting, writing, and the proof that a cut is right."""
