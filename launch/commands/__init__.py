"""The commands of ``anemoi-dist``, one module each."""
