"""``anemoi-dist report``: one HTML page about a run."""
