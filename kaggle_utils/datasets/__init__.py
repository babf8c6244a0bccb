"""Data sets in DFDC's layout: the real one and the miniature."""
