"""A page on this computer into which clips are dropped: ``python -m kaggle_utils app``."""
