"""Stores of committed checkpoints. A directory is a checkpoint only if its manifest is valid."""

from __future__ import annotations

import io
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from anemoi_dist.checkpoint.manifest import MANIFEST_FILE, Manifest
from anemoi_dist.config.tree import read_yaml
from anemoi_dist.errors import ConfigError
from anemoi_dist.run.directory import RunDirectory, fsync_directory, write_atomically

_COMMITTED = re.compile(r"step-(\d{8,})")
_TEMPORARY = re.compile(r"step-\d{8,}\.[0-9a-f]{16}\.(tmp|broken)")


class File(Protocol):
    """A file of a checkpoint; a ``pathlib.Path`` is one."""

    @property
    def name(self) -> str:
        """The last part of its path."""

    def open(self, mode: str, *, buffering: int) -> Any:
        """Open it as a binary stream."""

    def read_text(self, *, encoding: str) -> str:
        """Return what is in it."""


class Folder(Protocol):
    """A checkpoint, or a save under way; a ``pathlib.Path`` is one."""

    @property
    def name(self) -> str:
        """The last part of its path."""

    def __truediv__(self, name: str) -> Any:
        """Return the :class:`File` of that name in it."""


class Store(Protocol):
    """A place for checkpoints. Every implementation passes the suite in ``tests/checkpoint/test_store.py``."""

    def steps(self) -> list[int]:
        """Return the steps that may have a checkpoint, newest first; only reading one tells whether it is whole."""

    def path(self, step: int) -> Folder:
        """Return the committed checkpoint of a step."""

    def begin(self, step: int, save_id: str) -> Folder:
        """Make the folder that a save writes into. On one rank."""

    def staging_path(self, step: int, save_id: str) -> Folder:
        """Return the folder that :meth:`begin` has made. On any rank."""

    def commit(self, folder: Folder, manifest: Manifest) -> Folder:
        """Make a save whose files are durable the checkpoint of its step, atomically."""

    def discard(self, folder: Folder) -> None:
        """Remove a save that failed."""

    def remove(self, step: int) -> None:
        """Delete a checkpoint, manifest first: killed half-way, what is left is no checkpoint."""


def make_durable(stream: BinaryIO) -> None:
    """Flush a stream to the disk; an object store's is durable once it is closed."""
    stream.flush()
    # A rename may reach the disk before the data does: after a power cut a committed checkpoint would hold zeros.
    try:
        descriptor = stream.fileno()
    except (AttributeError, io.UnsupportedOperation):
        return
    os.fsync(descriptor)


class LocalStore:
    """Checkpoints as directories ``step-<step>`` of one folder.

    Parameters
    ----------
    folder : Path
        ``checkpoints/`` of a run; it exists.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def steps(self) -> list[int]:
        """Return the steps that have a directory, newest first; only reading one tells whether it is whole."""
        matches = (_COMMITTED.fullmatch(entry.name) for entry in self.folder.iterdir() if entry.is_dir())
        return sorted((int(match[1]) for match in matches if match), reverse=True)

    def path(self, step: int) -> Path:
        """Return the directory of a committed checkpoint."""
        return self.folder / f"step-{step:08d}"

    def begin(self, step: int, save_id: str) -> Path:
        """Create the directory that a save writes into."""
        folder = self.staging_path(step, save_id)
        folder.mkdir(mode=0o700)  # no exist_ok: two saves in one directory would mix their files
        return folder

    def staging_path(self, step: int, save_id: str) -> Path:
        """Return the directory that :meth:`begin` has created."""
        return self.folder / f"step-{step:08d}.{save_id}.tmp"

    def commit(self, folder: Folder, manifest: Manifest) -> Path:
        """Write the manifest and give the directory its final name.

        The order makes it atomic: the files are durable before the manifest, the manifest before the rename, and the
        rename before anyone is told. A directory that already has the name was passed over as broken, else this step
        would not have been trained again: it is kept aside until the next clean-up.
        """
        assert isinstance(folder, Path), "a folder of this store"
        # Killed before this line there is no manifest; between it and the rename, no directory of that name.
        write_atomically(folder / MANIFEST_FILE, manifest.to_json())
        final = self.path(manifest.step)
        if final.exists():
            final.rename(folder.with_suffix(".broken"))
        folder.rename(final)
        fsync_directory(self.folder)
        self._clean()
        return final

    def discard(self, folder: Folder) -> None:
        """Remove the directory of a save that failed, as far as that is possible."""
        assert isinstance(folder, Path), "a folder of this store"
        shutil.rmtree(folder, ignore_errors=True)

    def remove(self, step: int) -> None:
        """Delete a checkpoint, manifest first: killed half-way, what is left is no checkpoint."""
        folder = self.path(step)
        if folder.is_symlink():  # it points to somebody's archive, which is not ours to delete
            folder.unlink()
            return
        # Made durable: after a power cut the files could be gone and the manifest still there.
        (folder / MANIFEST_FILE).unlink(missing_ok=True)
        fsync_directory(folder)
        shutil.rmtree(folder)

    def _clean(self) -> None:
        """Remove leftovers of interrupted saves; a save has just succeeded, so none is under way.

        That save has succeeded whatever happens here: leftovers that cannot be removed stay.
        """
        for entry in self.folder.iterdir():
            if not _TEMPORARY.fullmatch(entry.name):
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                with suppress(OSError):
                    entry.unlink()


def open_store(run: RunDirectory, url: str | None) -> Store:
    """Return the store of a run: in its directory, or where its configuration says.

    Parameters
    ----------
    run : RunDirectory
        Its directory exists.
    url : str | None
        ``checkpoint.url``.

    Raises
    ------
    ConfigError
        No installed fsspec driver reaches ``url``.
    """
    if url is None:
        return LocalStore(run.checkpoints_dir)
    # fsspec takes a tenth of a second to import, and most runs keep their checkpoints in their directory.
    from anemoi_dist.checkpoint.fsspec_store import FsspecStore

    try:
        return FsspecStore(f"{url.rstrip('/')}/{run.run_id}")
    except (ValueError, ImportError) as error:
        raise ConfigError("checkpoint.url", url, str(error)) from error


def store_of(run: RunDirectory) -> Store:
    """Return the store of a run that exists, by its frozen configuration."""
    frozen = read_yaml(run.config_file) if run.config_file.is_file() else {}
    return open_store(run, (frozen.get("checkpoint") or {}).get("url"))


def parse_name(text: str) -> tuple[Path | None, str, int | None]:
    """Return what ``RUN``, ``RUN@STEP`` or the directory of a checkpoint names: that directory, or run and step."""
    path = Path(text)
    if _COMMITTED.fullmatch(path.absolute().name) and path.is_dir():
        return path.absolute(), "", None
    name, at, number = text.rpartition("@")
    if at and number.isdecimal() and not path.is_dir():
        return None, name, int(number)
    return None, text, None
