"""Read untrusted video and sound files."""
