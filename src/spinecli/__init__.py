"""spine: prune, recover and measure language models for small devices."""

__version__ = "0.1.0"
