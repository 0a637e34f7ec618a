"""A run on disk: its directory, its owner, its attempts and its events. No torch."""
