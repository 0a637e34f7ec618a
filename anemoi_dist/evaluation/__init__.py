"""Scores of the forecast on the validation and test splits, beside baselines."""
