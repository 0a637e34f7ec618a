"""The weather forecast: the task that the package brings with it."""
