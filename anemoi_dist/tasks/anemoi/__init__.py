"""The task that a configuration of anemoi-training describes: its model, data, losses and metrics, trained here."""
