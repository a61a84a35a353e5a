"""A checkpoint in the form that a device runs: GGUF for llama.cpp, or a plain Hugging Face directory."""
