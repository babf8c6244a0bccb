"""Faces: found, cut, learnt and judged."""
