"""Fuse the scores of faces and voice into one probability."""
