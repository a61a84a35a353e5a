"""The files that steps hand to each other: manifests, sums, whole-or-nothing directories, resumable state."""
