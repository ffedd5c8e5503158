"""One seam over local folders and fsspec URLs: read, list, create exclusively, replace and remove."""

from __future__ import annotations

import contextlib
import os
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import fsspec

from grape_ray.errors import StorageError

_TEMPORARY = ".tmp-"


class Storage:
    """A folder, local or at any fsspec URL; names are relative paths with forward slashes.

    Args:
        url: a local path, ``file://...``, ``s3://bucket/folder``, ``memory://folder`` or another protocol that fsspec knows.

    Attributes:
        url: the folder, absolute. local: whether it is on a file system of this machine.

    Raises:
        StorageError: no driver for the URL, or the location cannot be reached (from every method; a missing name is FileNotFoundError).
    """

    def __init__(self, url: str | os.PathLike[str]):
        url = os.fspath(url)
        if not url:
            raise StorageError("the storage location is empty", url, "a path or URL", "name a folder")
        try:
            # Listings of another process's files must be fresh, so nothing is cached.
            self._fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
        except Exception as error:  # a driver may raise anything
            raise StorageError("no driver for the storage location", url, "a path, s3:// or another fsspec URL", str(error)) from error
        self._root = root.rstrip("/") or "/"
        self.local = "file" in (self._fs.protocol if isinstance(self._fs.protocol, tuple) else (self._fs.protocol,))
        self.url = self._root if self.local else self._fs.unstrip_protocol(self._root)

    def __repr__(self) -> str:
        return f"Storage({self.url!r})"

    def child(self, name: str) -> Storage:
        """The folder of that name under this one."""
        return Storage(f"{self.url.rstrip('/')}/{self._checked(name)}")

    def read(self, name: str) -> bytes:
        """The whole content of a file."""
        with self._translate("read", name):
            return self._fs.cat_file(self._path(name))

    def open(self, name: str, mode: str = "rb") -> IO[Any]:
        """An open file, ``rb`` or ``wb``; folders are made as needed. Writing is not atomic: use ``write`` or a manifest for that."""
        with self._translate("open", name):
            if self.local and "r" not in mode:
                Path(self._path(name)).parent.mkdir(parents=True, exist_ok=True)
            return self._fs.open(self._path(name), mode)

    def create(self, name: str, data: bytes) -> None:
        """Make a file that does not exist yet; when this returns it is whole and durable, and of two creators one wins.

        Raises:
            FileExistsError: the name is taken.
        """
        with self._translate("create", name):
            if self.local:
                self._place(name, data, exclusive=True)
            else:
                self._fs.pipe_file(self._path(name), data, mode="create")

    def write(self, name: str, data: bytes) -> None:
        """Make or replace a file; readers see the old content or the new, never a mixture."""
        with self._translate("write", name):
            if self.local:
                self._place(name, data, exclusive=False)
            else:
                self._fs.pipe_file(self._path(name), data)

    def list(self, prefix: str = "") -> list[str]:
        """Sorted names of the files, at any depth, that start with ``prefix``; empty where the folder does not exist."""
        with self._translate("list", prefix or "."):
            start = posixpath.dirname(prefix)
            folder = self._path(start) if start else self._root
            try:
                paths = self._fs.find(folder)
            except FileNotFoundError:
                return []
            cut = len(self._root.rstrip("/")) + 1
            names = (path[cut:] for path in paths)
            return sorted(n for n in names if n.startswith(prefix) and not posixpath.basename(n).startswith(_TEMPORARY))

    def exists(self, name: str) -> bool:
        """Whether a file of that name, or a folder with files, is there."""
        with self._translate("look up", name):
            return self._fs.exists(self._path(name))

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all it holds; nothing happens where it is missing."""
        with self._translate("remove", name), contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._path(name), recursive=True)

    def check_writable(self) -> None:
        """Try the location out, so that a run ends before its first step where it could not keep its results.

        Raises:
            StorageError: nothing can be written there, or an existing file can be created a second time (a ledger needs it to fail).
        """
        probe = f"probe-{os.urandom(8).hex()}"
        self.create(probe, b"1")
        try:
            self.create(probe, b"2")
        except FileExistsError:
            return
        finally:
            self.remove(probe)
        fix = "use a local folder or an S3 store with conditional writes"
        raise StorageError(f"{self.url} overwrites where it should refuse", None, "exclusive creation of files", fix)

    def _path(self, name: str) -> str:
        """The driver's path of a name."""
        return f"{self._root.rstrip('/')}/{self._checked(name)}"

    @staticmethod
    def _checked(name: str) -> str:
        """Refuse a name that would leave the folder."""
        if not name or name.startswith("/") or any(part in ("", ".", "..") for part in name.rstrip("/").split("/")):
            raise StorageError("a name leaves its folder", name, "a relative path without '..'", "correct the name")
        return name.rstrip("/")

    def _place(self, name: str, data: bytes, *, exclusive: bool) -> None:
        """Write beside, fsync, then link (fails when taken) or rename (replaces), and fsync the folder."""
        path = Path(self._path(name))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:  # not the name that is taken, but the folder's place
            raise StorageError("a file is in the way", str(path.parent), "a folder, or nothing yet", "choose another location") from error
        temporary = path.with_name(f"{_TEMPORARY}{os.urandom(8).hex()}")
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            (os.link if exclusive else os.replace)(temporary, path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _translate(self, action: str, name: str) -> Iterator[None]:
        """Turn whatever a driver raises into a StorageError; a taken or a missing name stays what it is."""
        try:
            yield
        except (FileExistsError, StorageError):
            raise
        except Exception as error:
            if isinstance(error, FileNotFoundError) and action in ("read", "open"):
                raise
            reason = f"{type(error).__name__}: {error}"
            what = f"cannot {action} {name} in {self.url}"
            raise StorageError(what, reason, "a location you may use", "check path and access") from error


def _sync_folder(folder: Path) -> None:
    """Make the folder's list of names durable, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
