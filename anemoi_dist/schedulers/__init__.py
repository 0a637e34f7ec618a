"""Learning rate schedulers and how they come from configuration."""

from anemoi_dist.schedulers.factory import create_scheduler, scaled_rate, set_num_updates

__all__ = ["create_scheduler", "scaled_rate", "set_num_updates"]
