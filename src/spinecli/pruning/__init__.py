"""What to cut: importance of blocks, heads and channels, the budget, COMP and the methods it is measured against."""
