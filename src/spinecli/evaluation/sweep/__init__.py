"""One chain over several sparsities and methods, with one scoring pass."""
