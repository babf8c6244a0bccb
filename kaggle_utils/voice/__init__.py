"""Prepare voices, and the voice networks."""
