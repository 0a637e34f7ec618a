"""Checkpoints of other programs, converted to ours."""
