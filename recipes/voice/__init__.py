"""Train and judge the voice networks."""
