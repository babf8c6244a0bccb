"""Train and evaluate the voice networks."""
