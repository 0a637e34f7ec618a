"""Datasets, the order of their samples, and the batches that a rank reads."""
