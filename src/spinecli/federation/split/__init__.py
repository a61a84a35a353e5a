"""Split training: the cut model, both halves' work, their conversation."""
