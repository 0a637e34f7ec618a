"""Datasets, the global sample order, and the batches of each rank."""
