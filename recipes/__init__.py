"""Data preparation, training and evaluation of the shipped weights. Only in a clone of the repository."""
