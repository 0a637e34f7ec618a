"""Scores of the forecast and of baselines on the validation and test splits."""
