"""Where the checkpoints of a run are: in its directory, or where its configuration says. No torch."""

from __future__ import annotations

from anemoi_dist.checkpoint.store import LocalStore, Store
from anemoi_dist.config.tree import read_yaml
from anemoi_dist.errors import ConfigError
from anemoi_dist.run.directory import RunDirectory


def open_store(run: RunDirectory, url: str | None) -> Store:
    """Return the store of a run.

    Parameters
    ----------
    run : RunDirectory
        Its directory exists.
    url : str | None
        ``checkpoint.url``.

    Raises
    ------
    ConfigError
        Nothing is installed that reaches ``url``.
    """
    if url is None:
        return LocalStore(run.checkpoints_dir)
    from anemoi_dist.checkpoint.fsspec_store import FsspecStore

    try:
        return FsspecStore(f"{url.rstrip('/')}/{run.run_id}")
    except (ValueError, ImportError) as error:
        raise ConfigError("checkpoint.url", url, str(error)) from error


def store_of(run: RunDirectory) -> Store:
    """Return the store of a run that exists, by its frozen configuration."""
    frozen = read_yaml(run.config_file) if run.config_file.is_file() else {}
    return open_store(run, (frozen.get("checkpoint") or {}).get("url"))
