"""Recovering a pruned checkpoint: least squares per projection, the walk of teacher and student."""
