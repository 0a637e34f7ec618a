"""The oldest versions of Anemoi that ``task=anemoi`` runs with. Nothing is imported: metadata alone are read."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

from anemoi_dist.errors import ConfigError

#: Package -> its oldest version that this product is tested with, and why no older one serves.
OLDEST = {
    "anemoi-training": ("0.17.1", "its training methods, tasks and datasets have this interface since then"),
    "anemoi-models": ("0.19.0", "anemoi-training 0.17.1 configures models by encoders and decoders with names"),
    "anemoi-graphs": ("0.9.8", "anemoi-training 0.17.1 builds its graphs by it"),
}
_INSTALL = "pip install --no-deps -r requirements-anemoi.txt"


def check_versions() -> None:
    """Raise :class:`ConfigError` if a package of Anemoi is missing or older than the oldest that is supported."""
    for package, (oldest, reason) in OLDEST.items():
        try:
            installed = version(package)
        except PackageNotFoundError:
            raise ConfigError("task.kind", "anemoi", f"needs {package}, which is not installed", fix=_INSTALL) from None
        if _numbers(installed) < _numbers(oldest):
            raise ConfigError(
                "task.kind",
                "anemoi",
                f"{package} {installed} is installed; {oldest} is the oldest that is supported: {reason} "
                "(beside a newer torch, pip silently takes old ones)",
                fix=_INSTALL,
            )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3])
