"""What a run shows and records: events, progress, metrics."""
