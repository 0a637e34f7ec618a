"""Where committed checkpoints live. What has a valid manifest is a checkpoint; nothing else says so."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from anemoi_dist.checkpoint.manifest import MANIFEST_FILE, Manifest
from anemoi_dist.run_directory import fsync_directory, write_atomically

_COMMITTED = re.compile(r"step-(\d{8,})")
_TEMPORARY = re.compile(r"step-\d{8,}\.[0-9a-f]{16}\.(tmp|broken)")


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
        """Return the steps that have a directory, newest first; whether they are whole is for the reader to say."""
        matches = (_COMMITTED.fullmatch(entry.name) for entry in self.folder.iterdir() if entry.is_dir())
        return sorted((int(match[1]) for match in matches if match), reverse=True)

    def path(self, step: int) -> Path:
        """Return the directory of a committed checkpoint."""
        return self.folder / f"step-{step:08d}"

    def begin(self, step: int, save_id: str) -> Path:
        """Create the directory that a save writes into."""
        folder = self.folder / f"step-{step:08d}.{save_id}.tmp"
        folder.mkdir(mode=0o700)
        return folder

    def commit(self, folder: Path, manifest: Manifest) -> Path:
        """Write the manifest and give the directory its final name.

        The order makes it atomic: the files are durable before the manifest, the manifest before the rename, and the
        rename before anyone is told. A directory that already has the name was passed over as broken, else this step
        would not have been trained again: it is kept aside until the next clean-up.
        """
        write_atomically(folder / MANIFEST_FILE, manifest.to_json())
        final = self.path(manifest.step)
        if final.exists():
            final.rename(folder.with_suffix(".broken"))
        folder.rename(final)
        fsync_directory(self.folder)
        self._clean()
        return final

    def discard(self, folder: Path) -> None:
        """Remove the directory of a save that failed."""
        shutil.rmtree(folder, ignore_errors=True)

    def remove(self, step: int) -> None:
        """Delete a checkpoint, manifest first: killed half-way, what is left is no checkpoint."""
        folder = self.path(step)
        if folder.is_symlink():  # what it points to is somebody's archive
            folder.unlink()
            return
        (folder / MANIFEST_FILE).unlink(missing_ok=True)
        fsync_directory(folder)
        shutil.rmtree(folder)

    def _clean(self) -> None:
        """Remove what interrupted saves left behind; a save has just succeeded, so none is under way.

        The save has succeeded whatever happens here, so what resists stays.
        """
        for entry in self.folder.iterdir():
            if not _TEMPORARY.fullmatch(entry.name):
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
