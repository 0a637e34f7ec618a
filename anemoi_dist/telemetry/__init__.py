"""Telemetry of a run: heartbeats, watchdog, progress display, phases, metrics."""
