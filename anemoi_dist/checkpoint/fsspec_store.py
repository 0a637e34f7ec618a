"""Checkpoints in an object store, or in any other that fsspec reaches: committed by one object, never by a rename."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import Any

import fsspec

from anemoi_dist.checkpoint.manifest import HASH_BLOCK_BYTES, MANIFEST_FILE, Manifest
from anemoi_dist.errors import CheckpointError

_SAVE_ID = re.compile(r"[0-9a-f]{16}")
_MANIFEST = re.compile(rf"(?:.*/)?step-(\d{{8,}})/{re.escape(MANIFEST_FILE)}")


class RemoteFile:
    """One object."""

    def __init__(self, filesystem: fsspec.AbstractFileSystem, path: str) -> None:
        self._filesystem, self._path = filesystem, path

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self._path.rsplit("/", 1)[-1]

    def open(self, mode: str, *, buffering: int) -> Any:
        """Open it as a binary stream; a new one appears when the stream is closed."""
        del buffering  # fsspec's streams have their own
        return self._filesystem.open(self._path, mode.replace("x", "w"), block_size=HASH_BLOCK_BYTES)

    def read_text(self, *, encoding: str) -> str:
        """Return what is in it."""
        return self._filesystem.cat_file(self._path).decode(encoding)


class RemoteFolder:
    """The prefix of one step: ``manifest.json``, and the files of each save of that step below its save id.

    Parameters
    ----------
    filesystem : fsspec.AbstractFileSystem
        Where it is.
    path : str
        The prefix.
    save_id : str, optional
        The save whose files are meant; by default the one that the manifest commits.
    """

    def __init__(self, filesystem: fsspec.AbstractFileSystem, path: str, save_id: str | None = None) -> None:
        self._filesystem, self.path, self._save_id = filesystem, path, save_id

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.rsplit("/", 1)[-1]

    @property
    def save_id(self) -> str:
        """The save whose files these are.

        Raises
        ------
        CheckpointError
            The manifest does not say.
        """
        if self._save_id is None:
            try:
                save_id = json.loads((self / MANIFEST_FILE).read_text(encoding="utf-8"))["save_id"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{self.name} has no readable manifest: {error!r}") from error
            if not isinstance(save_id, str) or not _SAVE_ID.fullmatch(save_id):
                raise CheckpointError(f"{self.name} names a save id {save_id!r}, which no checkpoint has")
            self._save_id = save_id
        return self._save_id

    def __truediv__(self, name: str) -> RemoteFile:
        if name == MANIFEST_FILE:
            return RemoteFile(self._filesystem, f"{self.path}/{name}")
        return RemoteFile(self._filesystem, f"{self.path}/{self.save_id}/{name}")


class FsspecStore:
    """Checkpoints below a URL.

    A store of objects has no rename of a prefix, but replaces one object in one act. So a save's files go below a
    prefix of their own, where nobody looks for them, and ``manifest.json`` is put last: it commits.

    Parameters
    ----------
    url : str
        For instance ``s3://bucket/run`` or ``file:///shared/run``; the driver for its protocol is installed.
    """

    def __init__(self, url: str) -> None:
        self._filesystem, root = fsspec.core.url_to_fs(url)
        self._root = root.rstrip("/")

    def steps(self) -> list[int]:
        """Return the steps that have a manifest, newest first."""
        # fsspec remembers listings; a checkpoint that another process has committed since would not be seen.
        self._filesystem.invalidate_cache()
        found = self._filesystem.glob(f"{self._root}/step-*/{MANIFEST_FILE}")
        matches = (_MANIFEST.fullmatch(str(path)) for path in found)
        return sorted((int(match[1]) for match in matches if match), reverse=True)

    def path(self, step: int) -> RemoteFolder:
        """Return the committed checkpoint of a step."""
        return RemoteFolder(self._filesystem, self._prefix(step))

    def begin(self, step: int, save_id: str) -> RemoteFolder:
        """Return where a save writes; a prefix needs no making, a directory does."""
        self._filesystem.makedirs(f"{self._prefix(step)}/{save_id}", exist_ok=True)
        return self.staging_path(step, save_id)

    def staging_path(self, step: int, save_id: str) -> RemoteFolder:
        """Return where the save ``save_id`` writes."""
        return RemoteFolder(self._filesystem, self._prefix(step), save_id)

    def commit(self, folder: Any, manifest: Manifest) -> RemoteFolder:
        """Put the manifest, then remove what other saves have left."""
        assert isinstance(folder, RemoteFolder), "a folder of this store"
        self._put_manifest(folder, manifest)
        self._filesystem.invalidate_cache()
        self._clean()
        return self.path(manifest.step)

    def discard(self, folder: Any) -> None:
        """Remove the files of a save that failed, as far as that is possible."""
        assert isinstance(folder, RemoteFolder), "a folder of this store"
        self._remove_tree(f"{folder.path}/{folder.save_id}")

    def remove(self, step: int) -> None:
        """Delete a checkpoint, manifest first: killed half-way, what is left is no checkpoint."""
        self._filesystem.rm_file(f"{self._prefix(step)}/{MANIFEST_FILE}")
        self._remove_tree(self._prefix(step))

    def _prefix(self, step: int) -> str:
        return f"{self._root}/step-{step:08d}"

    def _put_manifest(self, folder: RemoteFolder, manifest: Manifest) -> None:
        """Replace the manifest in one act. Only fsspec's directories of this machine write in place: they rename."""
        path, data = f"{folder.path}/{MANIFEST_FILE}", manifest.to_json().encode()
        if "file" in _protocols(self._filesystem):
            temporary = f"{folder.path}/{folder.save_id}/{MANIFEST_FILE}"
            self._filesystem.pipe_file(temporary, data)
            self._filesystem.mv(temporary, path)
        else:
            self._filesystem.pipe_file(path, data)

    def _clean(self) -> None:
        """Remove the files of every save that no manifest names; a save has just succeeded, so none is under way."""
        for prefix in self._filesystem.glob(f"{self._root}/step-*/*"):
            step_prefix, _, save_id = str(prefix).rpartition("/")
            if not _SAVE_ID.fullmatch(save_id):
                continue
            try:
                committed = RemoteFolder(self._filesystem, step_prefix).save_id
            except CheckpointError:
                if self._filesystem.exists(f"{step_prefix}/{MANIFEST_FILE}"):
                    continue  # a damaged one is left for a person to look at
                committed = ""
            if committed != save_id:
                self._remove_tree(str(prefix))

    def _remove_tree(self, path: str) -> None:
        with suppress(OSError):  # it is no checkpoint, and the next clean-up tries again
            self._filesystem.rm(path, recursive=True)


def _protocols(filesystem: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    return (filesystem.protocol,) if isinstance(filesystem.protocol, str) else tuple(filesystem.protocol)
