"""Processes that end with the process they belong to."""
