"""Chains of commands as a file: read, run, and written back from what a chain has made."""
