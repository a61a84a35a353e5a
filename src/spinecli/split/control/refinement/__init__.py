"""The batches of a cohort, changed as little as its labels demand: MergeSFL Eq. 14."""
