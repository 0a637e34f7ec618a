"""Engines: how parameters, gradients and optimizer states are spread over ranks."""
