"""Kaggle: where things are mounted there, and the push."""
