"""Kaggle: the paths of its mounts, and pushing notebooks to it."""
