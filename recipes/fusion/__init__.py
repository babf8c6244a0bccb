"""Train and compare the fusion methods."""
