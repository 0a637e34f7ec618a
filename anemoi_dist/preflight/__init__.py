"""Checks before training: one machine, all ranks together, the size of the model."""
