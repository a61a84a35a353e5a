"""A checkpoint run block by block: the stream, what is observed in it, and its comparison with transformers."""
