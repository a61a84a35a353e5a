"""Recovery without training: masks, biases and output projections by closed-form least squares, block by block."""
