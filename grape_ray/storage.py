"""One seam over local folders and fsspec URLs: read, list, create exclusively, replace, upload and
remove.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import os
import posixpath
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec
import fsspec.config
import tenacity

from grape_ray.errors import StorageError

DEADLINE_S = 120.0
_TEMPORARY = ".tmp-"
_PART_BYTES = 16 << 20  # of a multipart upload: what it holds in memory beside its source
_FIRST_CONTACT_S = 15.0
_ROOM_EVERY_S = 0.5  # between two looks at a full disk
_AT_ONCE = 16  # small files of remote storage
# times that a folder may be removed, by another process's check, before a file is in it
_RACES = 100
Json = dict[str, Any]  # an object of the JSON files that are kept here
Block = bytes | memoryview  # of a file that is uploaded
_Result = TypeVar("_Result")

# One request ends within s3fs's own 15 s: what is worth another try is decided here, at one place,
# and not three times over.
_DRIVER_OPTIONS: dict[str, Json] = {"s3": {"config_kwargs": {"retries": {"total_max_attempts": 1}}}}
_DRIVER_TRIES = 3
_TRANSIENT = {
    getattr(errno, name)
    for name in ("EAGAIN", "EBUSY", "EIO", "EREMOTEIO", "ETIMEDOUT", "ECONNREFUSED", "ECONNRESET",
    "ECONNABORTED", "EPIPE", "ENETUNREACH",
                 "EHOSTUNREACH", "ENETDOWN")
    if hasattr(errno, name)
}  # fmt: skip
_NO_ROOM = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


class Storage:
    """A folder, local or at any fsspec URL; names are relative paths with forward slashes.

    Remote storage that throttles, times out, refuses or answers nonsense is asked again, with
    growing pauses, until the deadline; a local folder is asked once, but where it has no room:
    others may make some.

    Args:
        url: a local path, ``file://...``, ``s3://bucket/folder``, ``memory://folder`` or another
            protocol that fsspec knows.
        deadline_s: how long a call to remote storage is tried again.

    Attributes:
        url: the folder, absolute. local: whether it is on a file system of this machine.
            deadline_s: as given.

    Raises:
        StorageError: no driver for the URL, or the location cannot be reached (from every method; a
            missing name is FileNotFoundError).

    >>> folder = Storage("memory://runs").child("first")
    >>> folder.create("run.json", b"{}")
    >>> folder.list(), folder.read("run.json")
    (['run.json'], b'{}')
    """

    def __init__(self, url: str | os.PathLike[str], deadline_s: float = DEADLINE_S):
        url = os.fspath(url)
        if not url:
            raise StorageError(
                "the storage location is empty", url, "a path or URL", "name a folder"
            )
        # a cache in between is stale, and a table of references is a program
        if "::" in url or url.startswith("reference:"):
            raise StorageError(
                "the storage location is a chain of drivers",
                url,
                "one path or URL",
                "name the folder itself",
            )
        try:
            # Listings of another process's files must be fresh, so nothing is cached.
            driver = url.partition("://")[0].removesuffix("a")
            options = {
                k: v
                for k, v in _DRIVER_OPTIONS.get(driver, {}).items()
                if k not in fsspec.config.conf.get(driver, {})
            }
            self._fs, root = fsspec.core.url_to_fs(
                url, use_listings_cache=False, skip_instance_cache=True, **options
            )
            if driver in _DRIVER_OPTIONS:
                self._fs.retries = _DRIVER_TRIES
        except Exception as error:  # a driver may raise anything
            raise StorageError(
                "no driver for the storage location",
                url,
                "a path, s3:// or another fsspec URL",
                str(error),
            ) from error
        self._root = root.rstrip("/") or "/"
        self.local = "file" in (
            self._fs.protocol if isinstance(self._fs.protocol, tuple) else (self._fs.protocol,)
        )
        self.url: str = self._root if self.local else self._fs.unstrip_protocol(self._root)
        self.deadline_s, self._impatient = deadline_s, False
        self._fix = "when the storage works again, run `grape-ray resume`"

    def __repr__(self) -> str:
        return f"Storage({self.url!r})"

    def child(self, name: str) -> Storage:
        """The folder of that name under this one."""
        found = Storage(f"{self.url.rstrip('/')}/{self._checked(name)}", self.deadline_s)
        found._impatient, found._fix = self._impatient, self._fix
        return found

    def first_contact(self) -> Storage:
        """The same folder, with a short deadline: a mistyped address should be refused in seconds,
        not minutes.
        """
        found = copy.copy(self)
        found.deadline_s, found._impatient = min(self.deadline_s, _FIRST_CONTACT_S), True
        found._fix = "check the address, or call again when the storage works"
        return found

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """The content of a file, or its bytes ``start`` to ``end`` (half open)."""
        with self._translate("read", name):
            return self._persist(lambda: self._fs.cat_file(self._path(name), start=start, end=end))

    def read_many(self, names: Iterable[str]) -> list[bytes | None]:
        """The contents of files, None for those that are missing; of remote storage many at once,
        since each answer is waited for.
        """

        def content(name: str) -> bytes | None:
            try:
                return self.read(name)
            except FileNotFoundError:
                return None

        if self.local:
            return [content(name) for name in names]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(content, names))

    def size(self, name: str) -> int:
        """Bytes of a file."""
        with self._translate("read", name):
            return self._persist(lambda: self._fs.size(self._path(name)))

    def create(self, name: str, data: bytes, private: bool = False) -> None:
        """Make a file that does not exist yet; when this returns it is whole and durable, and of
        two creators one wins.

        An answer of remote storage may be lost after the file was made, and the next try then finds
        the name taken. So there the name counts as taken only where it holds something else: let
        creators that must not both win differ in what they write.

        Args:
            private: on a local file system nobody but the owner may read it (mode 0600), nor list
                folders made for it (0700).

        Raises:
            FileExistsError: the name is taken.
        """
        with self._translate("create", name):
            if self.local:
                self._place(name, lambda: [data], exclusive=True, private=private)
                return
            try:
                self._persist(lambda: self._fs.pipe_file(self._path(name), data, mode="create"))
            except FileExistsError:
                # what lies there may be this call's own, whose answer was lost
                if self._persist(lambda: self._fs.cat_file(self._path(name))) != data:
                    raise

    def write(self, name: str, data: bytes, private: bool = False) -> None:
        """Make or replace a file; readers see the old content or the new, never a mixture.
        `private`: as in `create`.
        """
        with self._translate("write", name):
            if self.local:
                self._place(name, lambda: [data], exclusive=False, private=private)
            else:
                self._persist(lambda: self._fs.pipe_file(self._path(name), data))

    def upload(self, name: str, blocks: Callable[[], Iterable[Block]]) -> None:
        """Make or replace a file of any size from blocks of bytes, in multipart uploads where the
        driver has them.

        Args:
            blocks: gives the blocks from the first on; it is called again for every try, so it must
                give the same ones.
        """

        def send() -> None:
            file = self._fs.open(self._path(name), "wb", block_size=_PART_BYTES)
            try:
                for block in blocks():
                    file.write(block)
                file.close()
            except BaseException:
                _give_up(file)
                raise

        with self._translate("write", name):
            if self.local:
                self._place(name, blocks, exclusive=False)
            else:
                self._persist(send)

    def list(self, prefix: str = "") -> list[str]:
        """Sorted names of the files, at any depth, that start with ``prefix``; empty where the
        folder does not exist.
        """
        with self._translate("list", prefix or "."):
            start = posixpath.dirname(prefix)
            folder = self._path(start) if start else self._root
            try:
                paths = self._persist(lambda: self._fs.find(folder))
            except FileNotFoundError:
                return []
            cut = len(self._root.rstrip("/")) + 1
            names = (path[cut:] for path in paths)
            return sorted(
                n
                for n in names
                if n.startswith(prefix) and not posixpath.basename(n).startswith(_TEMPORARY)
            )

    def exists(self, name: str) -> bool:
        """Whether a file of that name, or a folder with files, is there."""
        with self._translate("look up", name):
            return self._persist(lambda: self._fs.exists(self._path(name)))

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all it holds; nothing happens where it is missing."""
        with self._translate("remove", name), contextlib.suppress(FileNotFoundError):
            self._persist(lambda: self._fs.rm(self._path(name), recursive=True))

    def check_writable(self) -> None:
        """Try the location out, so that a run ends before its first step where it could not keep
        its results; nothing stays there.

        Raises:
            StorageError: nothing can be written there, or an existing file can be created a second
                time (a ledger needs it to fail).
        """
        probe, place = f"probe-{os.urandom(8).hex()}", self.first_contact()
        with self._leaving_nothing():
            place.create(probe, b"1")
            try:
                place.create(probe, b"2")
            except FileExistsError:
                return
            finally:
                place.remove(probe)
        fix = "use a local folder or an S3 store with conditional writes"
        raise StorageError(
            f"{self.url} overwrites where it should refuse",
            None,
            "exclusive creation of files",
            fix,
        )

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Storage]:
        """A folder under this one for the time of a block; nothing stays."""
        name = f"scratch-{os.urandom(8).hex()}"
        with self._leaving_nothing():
            try:
                yield self.child(name)
            finally:
                self.remove(name)

    @contextlib.contextmanager
    def _leaving_nothing(self) -> Iterator[None]:
        """Removes the folders down to this one that a block has made, where nothing else is in
        them.
        """
        missing = [
            folder
            for folder in (self._root, *map(str, Path(self._root).parents))
            if self.local and not os.path.exists(folder)
        ]
        try:
            yield
        finally:
            # the innermost first, up to where others' begin
            for folder in missing:
                with contextlib.suppress(OSError):  # another run may be using it by now
                    os.rmdir(folder)

    def _path(self, name: str) -> str:
        """The driver's path of a name."""
        return f"{self._root.rstrip('/')}/{self._checked(name)}"

    @staticmethod
    def _checked(name: str) -> str:
        """Refuse a name that would leave the folder."""
        if (
            not name
            or name.startswith("/")
            or any(part in ("", ".", "..") for part in name.rstrip("/").split("/"))
        ):
            raise StorageError(
                "a name leaves its folder", name, "a relative path without '..'", "correct the name"
            )
        return name.rstrip("/")

    def _persist(self, call: Callable[[], _Result]) -> _Result:
        """The result of `call`, tried again until the deadline while remote storage fails in a way
        that may pass.
        """
        if self.local:
            return call()
        tries = tenacity.Retrying(
            stop=tenacity.stop_after_delay(self.deadline_s),
            wait=tenacity.wait_random_exponential(multiplier=0.1, max=5),
            retry=tenacity.retry_if_exception(_may_pass),
            reraise=True,
        )
        return tries(call)

    def _place(
        self,
        name: str,
        blocks: Callable[[], Iterable[Block]],
        *,
        exclusive: bool,
        private: bool = False,
    ) -> None:
        """Write beside, fsync, then link (fails when taken) or rename (replaces), fsync the folder;
        waits for room till the deadline.
        """
        until_s = time.monotonic() + self.deadline_s
        while True:
            try:
                return self._place_once(name, blocks(), exclusive, private)
            except OSError as error:
                if error.errno not in _NO_ROOM or self._impatient or time.monotonic() > until_s:
                    raise
            time.sleep(_ROOM_EVERY_S)

    def _place_once(
        self, name: str, blocks: Iterable[Block], exclusive: bool, private: bool
    ) -> None:
        path = Path(self._path(name))
        temporary = path.with_name(f"{_TEMPORARY}{os.urandom(8).hex()}")
        try:
            with _begun(temporary, private) as file:
                for block in blocks:
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
            # a link refuses a name that is taken, where a rename would replace it
            (os.link if exclusive else os.replace)(temporary, path)
            _sync_folder(path.parent)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()

    @contextlib.contextmanager
    def _translate(self, action: str, name: str) -> Iterator[None]:
        """Turn whatever a driver raises into a StorageError; a taken or a missing name stays what
        it is.
        """
        try:
            yield
        except (FileExistsError, StorageError):
            raise
        except Exception as error:
            if isinstance(error, FileNotFoundError) and action == "read":
                raise
            reason = f"{type(error).__name__}: {error}"
            what = f"cannot {action} {name} in {self.url}"
            if isinstance(error, OSError) and error.errno in _NO_ROOM:
                raise StorageError(
                    what,
                    reason,
                    "room for the file",
                    "free space there, or choose another location",
                ) from error
            if not self.local and _may_pass(error):
                raise StorageError(
                    f"{what}, tried for {self.deadline_s:g} s",
                    reason,
                    "storage that answers",
                    self._fix,
                ) from error
            raise StorageError(
                what, reason, "a location you may use", "check path and access"
            ) from error


def _may_pass(error: BaseException) -> bool:
    """Whether remote storage may answer the same request when it is asked again: throttled, timed
    out, refused, cut off.
    """
    if isinstance(error, (FileNotFoundError, FileExistsError, PermissionError)):
        return False
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    for driver, name in (
        ("s3fs.core", "S3_RETRYABLE_ERRORS"),
        ("botocore.exceptions", "ConnectionError"),
        ("aiohttp", "ClientError"),
    ):
        kinds = getattr(sys.modules.get(driver), name, ())
        if isinstance(error, kinds):
            return True
    return isinstance(error, OSError) and error.errno in _TRANSIENT


def _begun(path: Path, private: bool) -> IO[bytes]:
    """A new file, in a folder that is made if need be: once more where another process's check has
    just taken it away.
    """
    races = 0
    while True:
        try:
            if private and not path.parent.exists():
                path.parent.parent.mkdir(parents=True, exist_ok=True)
                path.parent.mkdir(exist_ok=True, mode=0o700)
            path.parent.mkdir(parents=True, exist_ok=True)
            return os.fdopen(
                os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666),
                "wb",
            )
        except FileExistsError as error:  # not the name that is taken, but the folder's place
            raise StorageError(
                "a file is in the way",
                str(path.parent),
                "a folder, or nothing yet",
                "choose another location",
            ) from error
        except FileNotFoundError:
            races += 1
            if races == _RACES:
                raise


def _give_up(file: IO[bytes]) -> None:
    """Drops what was written to a remote file; closing it would keep a torn one."""
    with contextlib.suppress(Exception):
        file.discard()  # type: ignore[attr-defined]  # of drivers with multipart uploads
    with contextlib.suppress(Exception):
        file.closed = True  # type: ignore[misc]


def _sync_folder(folder: Path) -> None:
    """Make the folder's list of names durable, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
