"""Removal of secrets from a configuration that leaves the run directory. No torch."""

from __future__ import annotations

import re

_HIDDEN = "***"
#: ``user:password@`` or ``token@`` of a URL.
_USER = re.compile(r"(?<=://)[^/\s@'\"]+@")
#: The value of a key, of an override or of a URL's query that is named like a secret. ``null`` and ``''`` say nothing.
_NAMED = re.compile(
    r"(?i)(\b[\w.-]*(?:password|passwd|secret|token|credentials?|access_?key|api_?key)[\"']?\s*[:=]\s*)"
    r"(?!null\b|''|\"\"|[\s{\[])(\"[^\"\n]*\"|'[^'\n]*'|[^\s,}&'\"]+)"
)


def redact(text: str) -> str:
    """Return a text, such as a YAML file, without passwords and tokens of URLs and keys; YAML stays valid."""
    return _NAMED.sub(rf"\g<1>'{_HIDDEN}'", _USER.sub(f"{_HIDDEN}@", text))
