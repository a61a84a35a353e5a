"""Ways to choose who takes part, one file each."""
