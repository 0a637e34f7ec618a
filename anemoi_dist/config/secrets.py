"""Removal of secrets from a configuration that leaves the run directory. No torch."""

from __future__ import annotations

import re
from typing import Any

_HIDDEN = "***"
#: ``user:password@`` or ``token@`` of a URL.
_USER = re.compile(r"(?<=://)[^/\s@'\"]+@")
_SENSITIVE = r"(?:password|passwd|secret|token|credentials?|access_?key|api_?key)"
_KEY = re.compile(rf"(?i){_SENSITIVE}$")
#: The value of a key, of an override or of a URL's query that is named like a secret. ``null`` and ``''`` say nothing.
_NAMED = re.compile(
    rf"(?i)(\b[\w.-]*{_SENSITIVE}[\"']?\s*[:=]\s*)"
    r"(?!null\b|''|\"\"|[\s{\[])(\"[^\"\n]*\"|'[^'\n]*'|[^\s,}&'\"]+)"
)


def redact(text: str) -> str:
    """Return a text, such as a YAML file, without passwords and tokens of URLs and keys; YAML stays valid."""
    return _NAMED.sub(rf"\g<1>'{_HIDDEN}'", _USER.sub(f"{_HIDDEN}@", text))


def redact_values(value: Any, *, key: str = "") -> Any:
    """Return a copy of nested dictionaries and lists without passwords and tokens of their URLs and keys."""
    if isinstance(value, dict):
        return {name: redact_values(below, key=str(name)) for name, below in value.items()}
    if isinstance(value, list | tuple):
        return [redact_values(item, key=key) for item in value]
    if _KEY.search(key) and value not in (None, ""):
        return _HIDDEN
    return redact(value) if isinstance(value, str) else value
