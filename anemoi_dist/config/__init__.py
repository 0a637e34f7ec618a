"""From ``key=value`` to a checked configuration. No torch."""
