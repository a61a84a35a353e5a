"""Measuring models side by side: perplexity, lm-eval tasks, speed and memory."""
