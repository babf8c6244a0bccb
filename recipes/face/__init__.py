"""Train and judge the face networks."""
