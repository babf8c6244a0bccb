"""Train and compare the ways to join the branches."""
