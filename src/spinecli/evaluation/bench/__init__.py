"""Speed and memory of several checkpoints in torch and llama.cpp, beside what they promise."""
