"""Text in, token rows out, and the stream that carries them through a checkpoint block by block."""
