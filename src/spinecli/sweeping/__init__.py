"""One model, several ways and ratios to prune it: what each of them costs and what is left."""
