"""A training run, from a command to a folder."""
