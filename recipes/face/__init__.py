"""Train and evaluate the face networks."""
