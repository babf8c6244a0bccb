"""How the shipped weights were made: data, training runs and their evaluation. Needs the clone."""
