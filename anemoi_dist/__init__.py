"""Distributed training of data-driven weather models. Importing this package imports no torch."""

__version__ = "0.1.0"
