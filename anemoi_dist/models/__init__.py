"""Models that the examples train. A model maps normalised states to a normalised tendency."""
