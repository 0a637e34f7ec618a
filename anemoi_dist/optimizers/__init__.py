"""Optimizers and how they come from configuration."""

from anemoi_dist.optimizers.ademamix import AdEMAMix, ademamix_update, schedule_values
from anemoi_dist.optimizers.factory import create_optimizer

__all__ = ["AdEMAMix", "ademamix_update", "create_optimizer", "schedule_values"]
