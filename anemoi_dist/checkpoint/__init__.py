"""Checkpoints: safetensors ranges and JSON, committed by one rename."""
