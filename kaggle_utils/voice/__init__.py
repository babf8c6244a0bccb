"""Voices: made alike, learnt and judged."""
